// How a measure is spread over the clips that pass the other filters; dragging over the bars filters by it.
import { html, useEffect, useRef, useState } from "./preact-htm.js";
import { useAnswer } from "./api.js";
import { columnLabel, count, number, plural } from "./format.js";
import { filters, go, withRange } from "./state.js";

const BINS = 36;

// Edges as they stand in an address: short, and never so rounded that a clip at the edge is lost.
function edge(x, up) {
  const short = Number(x.toPrecision(6));
  if (up ? short >= x : short <= x) return String(short);
  return String(x);
}

function Bars({ data, span }) {
  const most = Math.max(...data.counts, 1);
  const tall = (n) => (n ? Math.max((46 * n) / most, 1.5) : 0);
  return html`<svg class="bars" viewBox=${`0 0 ${data.counts.length * 10} 46`} preserveAspectRatio="none" aria-hidden="true">
    ${data.counts.map((n, k) => {
      const outside = span && (k < span[0] || k > span[1]);
      return html`<g class=${outside ? "out" : ""}>
        <rect class="all" x=${k * 10 + 0.75} width="8.5" y=${46 - tall(n)} height=${tall(n)} />
        <rect class="kept" x=${k * 10 + 0.75} width="8.5" y=${46 - tall(data.kept[k])} height=${tall(data.kept[k])} />
      </g>`;
    })}
  </svg>`;
}

export function Histogram({ run, state, column }) {
  const query = filters(state, { sort: false });
  const { data, error, loading } = useAnswer(`api/histogram?column=${encodeURIComponent(column)}&bins=${BINS}&${query}`);
  const [draft, setDraft] = useState(null); // [first bin, last bin] while it is dragged or moved by keys
  const [hover, setHover] = useState(null);
  const area = useRef(null);
  const from = useRef(null);
  const later = useRef(0);
  const label = columnLabel(run, column);
  const range = state.range[column];
  useEffect(() => setDraft(null), [range?.[0], range?.[1]]);

  if (error) return html`<p class="soft small">${error}</p>`;
  if (!data) return html`<div class="histogram waiting" />`;
  if (!data.counts.length || data.edges.length < 2)
    return html`<p class="soft small">No clip has it.</p>`;
  const bins = data.counts.length;
  const binOf = (x) => Math.max(0, Math.min(bins - 1, Math.floor(((x - data.edges[0]) / (data.edges[bins] - data.edges[0] || 1)) * bins)));
  const last = (text) => {
    const bin = binOf(Number(text));
    return bin > 0 && Number(text) <= data.edges[bin] ? bin - 1 : bin; // an edge ends the bin before it
  };
  const set = range ? [range[0] === "" ? 0 : binOf(Number(range[0])), range[1] === "" ? bins - 1 : last(range[1])] : null;
  const span = draft ?? set;

  function commit([first, final]) {
    clearTimeout(later.current);
    const whole = first === 0 && final === bins - 1;
    const pair = whole ? null : [first === 0 ? "" : edge(data.edges[first], false), final === bins - 1 ? "" : edge(data.edges[final + 1], true)];
    if (whole) setDraft(null);
    go(withRange(state, column, pair));
  }
  const at = (event) => {
    const box = area.current.getBoundingClientRect();
    return Math.max(0, Math.min(bins - 1, Math.floor(((event.clientX - box.left) / box.width) * bins)));
  };
  function handle(which) {
    const [first, final] = span ?? [0, bins - 1];
    const value = which === 0 ? data.edges[first] : data.edges[final + 1];
    const move = (event) => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -6, PageUp: 6, Home: -bins, End: bins }[event.key];
      if (event.key === "Escape" || event.key === "Delete" || event.key === "Backspace") commit([0, bins - 1]);
      else if (by) {
        const step = by * (event.shiftKey ? 6 : 1);
        const next = which === 0 ? [Math.max(0, Math.min(final, first + step)), final] : [first, Math.max(first, Math.min(bins - 1, final + step))];
        setDraft(next);
        clearTimeout(later.current);
        later.current = setTimeout(() => commit(next), 350);
      } else return;
      event.preventDefault();
    };
    return html`<span
      class=${which === 0 ? "handle low" : "handle high"}
      role="slider"
      tabindex="0"
      aria-label=${`${label}, ${which === 0 ? "from" : "to"}`}
      aria-valuemin=${data.edges[0]}
      aria-valuemax=${data.edges[bins]}
      aria-valuenow=${value}
      aria-valuetext=${number(value)}
      style=${{ left: `${(100 * (which === 0 ? first : final + 1)) / bins}%` }}
      onKeyDown=${move}
      onPointerDown=${(event) => {
        event.stopPropagation();
        area.current.setPointerCapture(event.pointerId);
        from.current = which === 0 ? final : first; // the other end stays
        setDraft([first, final]);
      }}
    />`;
  }
  const drag = (event) => {
    if (from.current === null) return setHover(at(event));
    const here = at(event);
    setDraft([Math.min(from.current, here), Math.max(from.current, here)]);
  };
  const [low, high] = span ? [data.edges[span[0]], data.edges[span[1] + 1]] : [data.edges[0], data.edges[bins]];
  return html`<div class=${loading ? "histogram busy" : "histogram"} role="group" aria-label=${`${label}: histogram`}>
    <div
      class="brush"
      ref=${area}
      onPointerDown=${(event) => {
        if (event.button !== 0) return;
        area.current.setPointerCapture(event.pointerId);
        from.current = at(event);
        setDraft([from.current, from.current]);
      }}
      onPointerMove=${drag}
      onPointerUp=${() => {
        if (from.current !== null && draft) commit(draft);
        from.current = null;
      }}
      onPointerCancel=${() => ((from.current = null), setDraft(null))}
      onPointerLeave=${() => setHover(null)}
      onDblClick=${() => commit([0, bins - 1])}
    >
      <${Bars} data=${data} span=${span} />
      ${span && html`<span class="span" style=${{ left: `${(100 * span[0]) / bins}%`, width: `${(100 * (span[1] - span[0] + 1)) / bins}%` }} />`}
      ${handle(0)}${handle(1)}
    </div>
    <div class="axis">
      <span>${number(low)}</span>
      <span class="soft">
        ${
          hover !== null
            ? `${number(data.edges[hover])} – ${number(data.edges[hover + 1])}: ${plural(data.counts[hover], "clip")}`
            : data.missing
              ? `${count(data.missing)} without`
              : ""
        }
      </span>
      <span>${number(high)}</span>
    </div>
  </div>`;
}
