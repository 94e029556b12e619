// A clip frame by frame: where the models' frames lie on its time, and those frames as a strip.
import { html, useEffect, useMemo, useRef, useState } from "./preact-htm.js";
import { carried, get, mediaOf, stillOf, useAnswer } from "./api.js";
import { Still } from "./card.js";
import { useKeys } from "./keys.js";
import { recall, remember } from "./state.js";

const SPEEDS = [0.25, 0.5, 1, 2];

function Speaker({ on }) {
  return html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d="M2 6h2.5L8 3v10L4.5 10H2z" fill="currentColor" /><path d=${on ? "M10 5.5a3.5 3.5 0 0 1 0 5M12 3.5a6.4 6.4 0 0 1 0 9" : "M10.5 6l4 4m0-4l-4 4"} fill="none" stroke="currentColor" stroke-width="1.4" /></svg>`;
}

// The frame that is shown at a time: the last that has begun. A time may be rounded to the microsecond.
function frameAt(times, now) {
  let [low, high] = [0, times.length];
  while (low < high) {
    const mid = (low + high) >> 1;
    if (times[mid] <= now + 1e-4) low = mid + 1;
    else high = mid;
  }
  return Math.max(0, low - 1);
}

// The frame that begins closest to a time that another clock told.
function nearestFrame(times, t) {
  const k = frameAt(times, t);
  return times[k + 1] - t < t - times[k] ? k + 1 : k;
}

export function Player({ clip, run = "", autoplay = false }) {
  const video = useRef(null);
  const [now, setNow] = useState(0);
  const [playing, setPlaying] = useState(false);
  const [length, setLength] = useState(clip.duration_s ?? 0);
  const [muted, setMuted] = useState(() => recall("muted", true));
  const [speed, setSpeed] = useState(1);
  const [broken, setBroken] = useState(""); // why it cannot be played
  // Whether it is the clip or the browser, the server knows: it says why it has nothing to play.
  const fail = () =>
    get(`api/frames/${encodeURIComponent(clip.id)}${run && `?run=${run}`}`).then(
      () => setBroken("This browser cannot play the clip: its stills are shown."),
      (error) => setBroken(`Nothing to play: ${error.message}.`),
    );
  const src = mediaOf(clip.id, run);
  const [loaded, setLoaded] = useState(false);
  // When each frame is shown, as its file says: frames need not be equally long. Until it is known they are taken to be.
  const { data } = useAnswer(loaded && !carried ? `api/frames/${encodeURIComponent(clip.id)}${run && `?run=${run}`}` : null);
  const fps = clip.fps || 25;
  const equal = Math.max(1, clip.frames || Math.round(length * fps));
  const times = useMemo(() => (data?.times?.length ? data.times : Array.from({ length: equal }, (_, k) => k / fps)), [data, equal, fps]);
  const frames = times.length;
  const frame = frameAt(times, now);
  const middle = (k) => (times[k] + (times[k + 1] ?? Math.max(length, times[k]))) / 2; // no rounding shows the one beside it
  const known = data?.times?.length === clip.frames && clip.sample_frames?.length > 0;
  const sampled = (clip.sample_times?.length && known ? clip.sample_frames.map((k) => times[k]) : clip.sample_times) ?? [];

  useEffect(() => {
    let waiting = 0;
    const element = video.current;
    if (!element) return;
    const look = () => {
      setNow(element.currentTime);
      waiting = requestAnimationFrame(look);
    };
    if (playing) look();
    return () => cancelAnimationFrame(waiting);
  }, [playing]);
  useEffect(() => {
    if (!video.current) return;
    video.current.muted = muted;
    video.current.playbackRate = speed;
  }, [muted, speed]);

  const toggle = () => (video.current?.paused ? video.current.play().catch(() => {}) : video.current?.pause());
  const seek = (seconds) => {
    if (!video.current) return;
    video.current.pause();
    video.current.currentTime = Math.max(0, Math.min(seconds, length));
    setNow(video.current.currentTime);
  };
  const step = (by) => seek(middle(Math.max(0, Math.min(frames - 1, frame + by))));
  const show = (t) => seek(middle(nearestFrame(times, t)));
  const mute = () => setMuted((was) => (remember("muted", !was), !was));
  const sample = (by) => {
    const found = by > 0 ? sampled.find((t) => nearestFrame(times, t) > frame) : sampled.findLast((t) => nearestFrame(times, t) < frame);
    if (found !== undefined) show(found);
  };
  useKeys("Player", src ? [
    { keys: [" "], show: "Space", does: "play or pause", run: toggle },
    { keys: [","], show: ",", does: "a frame back", run: () => step(-1) },
    { keys: ["."], show: ".", does: "a frame on", run: () => step(1) },
    { keys: ["<"], show: "<", does: "sampled frame before", run: () => sample(-1) },
    { keys: [">"], show: ">", does: "next sampled frame", run: () => sample(1) },
    { keys: ["m"], show: "m", does: "sound on or off", run: mute },
  ] : []);

  const [picked, pick] = useState(0); // of the stills, where there is nothing to seek in
  const nearest = !sampled.length || !src || broken ? picked : sampled.reduce((best, t, k) => (Math.abs(t - now) < Math.abs((sampled[best] ?? 1e9) - now) ? k : best), 0);
  const shape = clip.width && clip.height ? { aspectRatio: `${clip.width} / ${clip.height}` } : {};
  return html`<section class="player" aria-label="Player">
    <div class="stage" style=${shape}>
      ${
        src && !broken
          ? html`<video
              ref=${video}
              key=${src}
              src=${src}
              poster=${stillOf(clip.id, 0, run)}
              loop
              playsinline
              autoplay=${autoplay}
              preload="auto"
              onClick=${toggle}
              onPlay=${() => setPlaying(true)}
              onPause=${() => setPlaying(false)}
              onSeeked=${({ currentTarget }) => setNow(currentTarget.currentTime)}
              onLoadedMetadata=${() => setLoaded(true)}
              onDurationChange=${({ currentTarget }) => Number.isFinite(currentTarget.duration) && setLength(currentTarget.duration)}
              onError=${fail}
            />`
          : html`<${Still} key=${nearest} id=${clip.id} run=${run} k=${nearest} alt="a frame of the clip" />`
      }
    </div>
    ${
      src &&
      !broken &&
      html`<div class="timeline">
          <input
            type="range"
            aria-label="Time in the clip"
            aria-valuetext=${`${now.toFixed(2)} seconds, frame ${frame}`}
            min="0"
            max=${length}
            step="any"
            value=${now}
            onInput=${(event) => seek(Number(event.target.value))}
            onKeyDown=${(event) => {
              const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
              if (by) (event.preventDefault(), step(by));
            }}
          />
          <div class="marks" aria-hidden="true">
            ${sampled.map((t, k) => html`<i class=${k === nearest ? "here" : ""} title=${`frame shown to the models: ${t.toFixed(2)} s`} style=${{ left: `${(100 * t) / (length || 1)}%` }} />`)}
          </div>
        </div>
        <div class="controls">
          <button onClick=${toggle} aria-label=${playing ? "Pause" : "Play"}>${playing ? "❚❚" : "►"}</button>
          <button onClick=${() => step(-1)} aria-label="A frame back" title="A frame back  ,">◂</button>
          <button onClick=${() => step(1)} aria-label="A frame on" title="A frame on  .">▸</button>
          <span class="clock">${now.toFixed(2)}<span class="hide-narrow"> / ${length.toFixed(2)}</span> s · frame <b data-frame>${frame}</b><span class="hide-narrow"> / ${frames - 1}</span></span>
          <select class="push" aria-label="Speed" value=${String(speed)} onChange=${(event) => setSpeed(Number(event.target.value))}>
            ${SPEEDS.map((s) => html`<option value=${String(s)}>${s}×</option>`)}
          </select>
          <button onClick=${mute} aria-pressed=${!muted} aria-label="Sound" title="Sound  m"><${Speaker} on=${!muted} /></button>
        </div>`
    }
    ${broken && html`<p class="soft small" role="status">${broken}</p>`}
    ${
      clip.stills > 0 &&
      html`<div class="filmstrip" role="group" aria-label="Frames shown to the models">
        ${Array.from(
          { length: clip.stills },
          (_, k) => html`<button
            aria-current=${k === nearest}
            onClick=${() => (pick(k), sampled[k] != null && show(sampled[k]))}
            aria-label=${`Frame ${k + 1} shown to the models${sampled[k] != null ? `, at ${sampled[k].toFixed(2)} seconds` : ""}`}
          >
            <${Still} id=${clip.id} run=${run} k=${k} /><span>${sampled[k] != null ? `${sampled[k].toFixed(2)} s` : k + 1}</span>
          </button>`,
        )}
      </div>`
    }
  </section>`;
}
