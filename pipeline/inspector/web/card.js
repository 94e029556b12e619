// One clip in the grid: its first still, and the clip itself while the mouse or the focus is on it.
import { html, useEffect, useRef, useState } from "./preact-htm.js";
import { mediaOf, stillOf } from "./api.js";
import { short, time, words } from "./format.js";

export const CARD_BODY = 118; // pixels under the picture: three lines of caption, two of facts

// A muted clip that plays; taken away, it stops loading at once.
export function Playing({ src }) {
  const video = useRef(null);
  useEffect(() => {
    const element = video.current;
    element.muted = true;
    element.play().catch(() => {}); // not decodable here: the still stays
    return () => {
      element.removeAttribute("src");
      element.load();
    };
  }, []);
  return html`<video ref=${video} src=${src} muted loop playsinline tabindex="-1" aria-hidden="true" />`;
}

export function Still({ id, k = 0, run = "", alt = "" }) {
  const [broken, setBroken] = useState(false);
  const src = stillOf(id, k, run);
  if (!src || broken) return html`<span class="nostill" aria-hidden="true">no picture</span>`;
  return html`<img src=${src} alt=${alt} loading="lazy" decoding="async" draggable=${false} onError=${() => setBroken(true)} />`;
}

export function Votes({ votes }) {
  if (!votes) return null;
  const best = Object.values(votes.best ?? {}).reduce((a, b) => a + b, 0);
  const said = [
    best && ["★", best, "best"],
    votes.bad && ["∅", votes.bad, "all bad"],
    votes.edit && ["✎", votes.edit, "edited"],
    votes.keep && ["✓", votes.keep, "keep"],
    votes.drop && ["✕", votes.drop, "drop"],
  ].filter(Boolean);
  return said.map(([sign, n, what]) => html`<span class="badge vote" title=${`voted: ${what} × ${n}`}>${sign}${n > 1 ? n : ""}</span>`);
}

export function Badges({ row }) {
  return html`
    ${row.kept === false && row.dropped_by.length === 0 && html`<span class="badge drop">dropped</span>`}
    ${row.dropped_by.map((rule) => html`<span class="badge drop" title=${`dropped by ${rule}`}>${words(rule)}</span>`)}
    ${row.flags.map((flag) => {
      const own = (row.chosen_flags ?? row.flags).includes(flag);
      const title = `flag of ${own ? "the chosen caption" : "another caption than the chosen one"}: ${flag}`;
      return html`<span class=${own ? "badge flag" : "badge"} title=${title}>⚑ ${words(flag)}</span>`;
    })}
  `;
}

export function Card({ row, index, href, onFocus, focusable }) {
  const [playing, setPlaying] = useState(false);
  const wait = useRef(0);
  const play = (ms) => (clearTimeout(wait.current), (wait.current = setTimeout(() => setPlaying(true), ms)));
  const stop = () => (clearTimeout(wait.current), setPlaying(false));
  useEffect(() => stop, []);
  if (!row) return html`<div class="card waiting" role="listitem" aria-hidden="true"><div class="picture" /></div>`;
  const media = mediaOf(row.id);
  return html`<div class=${row.kept === false ? "card dropped" : "card"} role="listitem">
    <a
      href=${href}
      data-index=${index}
      tabindex=${focusable ? 0 : -1}
      onFocus=${(event) => (onFocus(index), event.currentTarget.matches(":focus-visible") && play(250))}
      onBlur=${stop}
      onPointerEnter=${(event) => event.pointerType === "mouse" && play(90)}
      onPointerLeave=${stop}
    >
      <span class="picture">
        <${Still} key=${row.id} id=${row.id} />
        ${playing && media && html`<${Playing} src=${media} />`}
        <span class="length">${time(row.duration_s)}</span>
      </span>
      <span class="says" dir="auto">${row.caption || html`<i class="soft">no caption</i>`}</span>
      <span class="facts">
        ${row.similarity != null && html`<span>like <b>${short(row.similarity)}</b></span>`}
        ${row.agreement != null && html`<span title="agreement of its captions">agree <b>${short(row.agreement)}</b></span>`}
        ${row.fit != null && html`<span title="fit of the chosen caption">fit <b>${short(row.fit)}</b></span>`}
        ${row.gap != null && row.similarity == null && html`<span title="largest gap between two models">gap <b>${short(row.gap)}</b></span>`}
      </span>
      <span class="badges"><bdi class="who" title=${row.model ?? ""}>${row.model ?? ""}</bdi><${Votes} votes=${row.votes} /><${Badges} row=${row} /></span>
    </a>
  </div>`;
}
