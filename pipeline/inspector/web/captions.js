// Every caption of a clip side by side: what differs in words, what nothing supports, scores, prompts.
import { html } from "./preact-htm.js";
import { difference, unsupported } from "./diff.js";
import { number, plural, words } from "./format.js";

// A caption's text with the differences from another (or none) and the marks of sentences that nothing supports.
export function Text({ text, from = null, marks = [] }) {
  if (!text) return html`<p class="text soft">no text</p>`;
  const pieces = from === null ? null : difference(from, text);
  const cut = pieces ?? atMarks(text, marks);
  const groups = []; // runs of pieces under the same mark
  let mark = null;
  for (const piece of cut) {
    if (piece.start >= 0) mark = marks.find(([start, end]) => piece.start >= start && piece.start < end) ?? null;
    if (groups.at(-1)?.mark !== mark) groups.push({ mark, pieces: [] });
    const run = groups.at(-1).pieces;
    if (run.at(-1)?.kind === piece.kind) run.at(-1).text += piece.text;
    else run.push({ ...piece });
  }
  const show = (piece, k, run) => {
    if (piece.kind === "same") return piece.text;
    const body = piece.text.trimEnd();
    // What is gone stands apart from a word that ended the text; the space after a word is not marked.
    const before = piece.kind === "gone" && k > 0 && !/\s$/.test(run[k - 1].text) ? " " : "";
    const after = piece.text.slice(body.length);
    return piece.kind === "new" ? html`<ins>${body}</ins>${after}` : html`${before}<del>${body}</del>${after}`;
  };
  const long = text.length > 1200;
  return html`${from !== null && pieces === null && html`<p class="soft small">other words throughout</p>`}<p class=${long ? "text long" : "text"} dir="auto" tabindex=${long ? 0 : undefined}>
    ${groups.map(({ mark, pieces }) =>
      mark
        ? html`<span class="unsupported" title=${`Nothing supports this sentence: ${mark[2]}`}><span class="sr">unsupported: </span>${pieces.map(show)}</span>`
        : pieces.map(show),
    )}
  </p>`;
}

function atMarks(text, marks) {
  const cuts = [...new Set([0, ...marks.flatMap(([start, end]) => [start, end]), text.length])].sort((a, b) => a - b);
  return cuts.slice(0, -1).map((start, k) => ({ kind: "same", text: text.slice(start, cuts[k + 1]), start }));
}

function Scores({ caption, captions }) {
  const order = new Set(captions.flatMap((c) => Object.keys(c.scores ?? {}))); // the same in every card
  const names = [...order].filter((name) => name in (caption.scores ?? {}));
  if (!names.length) return null;
  return html`<dl class="scores">
    ${names.map((name) => {
      const all = captions.map((c) => c.scores?.[name]).filter(Number.isFinite);
      const [low, high] = [Math.min(0, ...all), Math.max(...all, 1e-9)];
      const value = caption.scores[name];
      const best = captions.length > 1 && value === Math.max(...all);
      return html`<dt title=${name}>${words(name)}</dt>
        <dd class=${best ? "best" : ""}>
          <span class="meter" aria-hidden="true"><i style=${{ width: `${(100 * (value - low)) / (high - low || 1)}%` }} /></span>${number(value)}
        </dd>`;
    })}
  </dl>`;
}

function Cost({ cost }) {
  const entries = Object.entries(cost ?? {});
  return entries.length ? html`<p class="soft small">${entries.map(([name, n]) => `${words(name)} ${number(n)}`).join(" · ")}</p>` : null;
}

function One({ caption, captions, number: key, from, marks, mine, onBest }) {
  const kind = ["caption"];
  if (caption.chosen) kind.push("chosen");
  if (mine) kind.push("voted");
  return html`<article class=${kind.join(" ")} aria-label=${`Caption of ${caption.model}`}>
    <header class="row">
      ${
        onBest && caption.text
          ? html`<button class="key" aria-pressed=${mine} title=${key < 10 ? `Best: key ${key}` : "Best"} aria-label=${`Vote ${caption.model} the best`} onClick=${onBest}>${key < 10 ? key : "★"}</button>`
          : ""
      }
      <h3><bdi>${caption.model}</bdi></h3>
      ${caption.chosen && html`<span class="badge kept">chosen</span>`}
      ${caption.layer && html`<span class="badge" title=${typeof caption.layer === "string" ? caption.layer : "added to the finished run"}>layer</span>`}
      ${caption.outcome && caption.outcome !== "ok" && html`<span class="badge drop">${caption.outcome}</span>`}
      ${(caption.flags ?? []).map((flag) => html`<span class="badge flag">⚑ ${words(flag)}</span>`)}
    </header>
    ${caption.outcome === "error" ? html`<p class="text soft">${caption.reason || "It gave no caption."}</p>` : html`<${Text} text=${caption.text} from=${from} marks=${marks} />`}
    <${Scores} caption=${caption} captions=${captions} />
    ${
      (caption.prompt || caption.raw || caption.made_from?.length > 0 || caption.support) &&
      html`<details>
        <summary>Prompt, raw answer, support</summary>
        ${caption.prompt && html`<h4>Prompt</h4><pre dir="auto">${caption.prompt}</pre>`}
        ${caption.raw && html`<h4>What it said, word for word</h4><pre dir="auto">${caption.raw}</pre>`}
        ${caption.made_from?.length > 0 && html`<h4>Put together from</h4><p><bdi>${caption.made_from.join(", ")}</bdi></p>`}
        ${Object.entries(caption.support ?? {}).map(
          ([judge, numbers]) => html`<h4>Support by ${words(judge)}</h4>
            <ol class="support">${(caption.sentences ?? []).map((sentence, k) => html`<li><bdi>${sentence}</bdi> <b>${number(numbers[k])}</b></li>`)}</ol>`,
        )}
        <${Cost} cost=${caption.cost} />
      </details>`
    }
  </article>`;
}

const VS = { chosen: "the chosen one", before: "the one before", none: "nothing" };

// `vs`: what each caption is compared with. `mine`: the model voted best. `onBest(model)`: absent where nobody votes.
export function Captions({ captions, vs, onVs, mine, onBest }) {
  const marks = unsupported(captions);
  const chosen = captions.find((caption) => caption.chosen);
  const found = [...marks.values()].reduce((n, list) => n + list.length, 0);
  const against = (caption, k) => {
    if (vs === "none" || !caption.text) return null;
    const other = vs === "before" ? captions.slice(0, k).findLast((c) => c.text) : caption.chosen ? null : chosen;
    return other?.text || null;
  };
  return html`<section class="captions" aria-label="Captions">
    <div class="row tools">
      <h2>${plural(captions.length, "caption")}</h2>
      ${found > 0 && html`<span class="soft small"><span class="unsupported">${plural(found, "sentence")}</span> that nothing supports</span>`}
      ${
        captions.length > 1 &&
        html`<div class="segments push" role="group" aria-label="Word differences from">
          <span class="soft small">differences from</span>
          ${Object.entries(VS).map(([name, label]) => html`<button aria-pressed=${vs === name} onClick=${() => onVs(name)}>${label}</button>`)}
        </div>`
      }
    </div>
    <div class="columns">
      ${captions.map(
        (caption, k) => html`<${One}
          key=${caption.model}
          caption=${caption}
          captions=${captions}
          number=${k + 1}
          from=${against(caption, k)}
          marks=${marks.get(caption.model)}
          mine=${mine === caption.model}
          onBest=${onBest && (() => onBest(caption.model))}
        />`,
      )}
    </div>
    ${captions.length === 0 && html`<p class="soft">No captioner described this clip.</p>`}
  </section>`;
}
