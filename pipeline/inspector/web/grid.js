// The grid of clips: only what is seen is asked for, drawn and loaded, however many there are.
import { html, useEffect, useLayoutEffect, useRef, useState } from "./preact-htm.js";
import { get } from "./api.js";
import { Card, CARD_BODY } from "./card.js";
import { useKeys } from "./keys.js";
import { useScroll } from "./scroll.js";
import { address, changed, filters, go, hasFilters, noFilters } from "./state.js";

const PAGE = 100; // rows asked for at once
const GAP = 12;
const OVER = 1; // rows of cards drawn beyond either edge

// {total, row(index), want(from, to), error, ms, loading} of a query; what was found before stays until the new answer comes.
function useRows(query) {
  const [, redraw] = useState(0);
  const shown = useRef({ query: null, total: null, pages: new Map(), ms: null, error: null });
  const asked = useRef({ query: null, pages: new Map() });
  const timer = useRef(0);
  if (asked.current.query !== query) {
    asked.current.pages.forEach((stop) => stop.abort());
    asked.current = { query, pages: new Map() };
  }
  useEffect(() => () => asked.current.pages.forEach((stop) => stop.abort()), []);

  function ask(page) {
    const mine = asked.current;
    if (mine.pages.has(page)) return;
    const stop = new AbortController();
    mine.pages.set(page, stop);
    get(`api/clips?${mine.query}&offset=${page * PAGE}&limit=${PAGE}`, stop.signal).then(
      (answer) => {
        if (asked.current !== mine) return;
        if (shown.current.query !== mine.query) shown.current = { query: mine.query, pages: new Map() };
        Object.assign(shown.current, { total: answer.total, ms: answer.ms, error: null });
        shown.current.pages.set(page, answer.rows);
        redraw((n) => n + 1);
      },
      (error) => {
        if (error.name === "AbortError" || asked.current !== mine) return;
        mine.pages.delete(page);
        shown.current = { query: mine.query, total: 0, pages: new Map(), error: error.message };
        redraw((n) => n + 1);
      },
    );
  }

  return {
    ...shown.current,
    loading: shown.current.query !== query,
    row: (index) => shown.current.pages.get(Math.floor(index / PAGE))?.[index % PAGE],
    // While a thumb is dragged over a million rows, only where it rests is asked for.
    want(from, to) {
      clearTimeout(timer.current);
      const pages = [];
      for (let p = Math.floor(from / PAGE); p <= Math.floor(Math.max(from, to - 1) / PAGE); p++) pages.push(p);
      const missing = pages.filter((p) => !asked.current.pages.has(p));
      // What scrolled away before it came is not waited for.
      for (const [p, stop] of asked.current.pages)
        if (!shown.current.pages.has(p) && !pages.includes(p)) (stop.abort(), asked.current.pages.delete(p));
      if (missing.length) timer.current = setTimeout(() => missing.forEach(ask), shown.current.query === query ? 60 : 0);
    },
  };
}

// How many cards stand side by side, and pixels from one row of them to the next.
function layout(width, cardWidth) {
  const inner = Math.max(width - 2 * GAP, 100);
  const columns = Math.max(1, Math.floor((inner + GAP) / (cardWidth + GAP)));
  return { columns, step: Math.round((((inner + GAP) / columns - GAP) * 9) / 16) + CARD_BODY + GAP };
}

export function Grid({ state, cardWidth, onFound }) {
  const query = filters(state);
  const rows = useRows(query);
  const [focus, setFocus] = useState(Number(state.at ?? 0));
  const moved = useRef(null); // the card that gets the focus once it is drawn
  const total = rows.total ?? 0;

  const heightAt = (width) => Math.ceil(total / layout(width, cardWidth).columns) * layout(width, cardWidth).step + GAP;
  const scroll = useScroll(heightAt, (top) => history.replaceState({ ...history.state, top }, ""));
  const { columns, step } = layout(scroll.width, cardWidth);
  const first = Math.max(0, Math.floor((scroll.top - GAP) / step) - OVER);
  const last = Math.ceil((scroll.top + scroll.view) / step) + OVER;
  const [from, to] = [Math.min(first * columns, total), Math.min(last * columns, total)];

  // Ask for what is seen; of a new query, for where it will be shown from.
  const found = useRef(null);
  useEffect(() => {
    if (!scroll.width) return;
    if (rows.loading && found.current !== query) {
      const at = Number(state.at ?? 0);
      rows.want(Math.max(0, at - PAGE / 2), at + PAGE / 2);
    } else rows.want(from, Math.max(to, 1));
  }, [query, rows.loading, from, to, scroll.width]);

  // A new answer is shown from its top, or from where this step of the history was left.
  useLayoutEffect(() => {
    if (rows.loading || !scroll.width || found.current === query) return;
    const earlier = found.current;
    found.current = query;
    const at = Number(state.at ?? 0);
    const row = Math.floor(at / columns) * step;
    if (state.at) {
      const top = history.state?.top;
      scroll.moveTo(top != null && row >= top && row + step <= top + scroll.view ? top : row - (scroll.view - step) / 2);
      moved.current = at;
      setFocus(at);
    } else {
      scroll.moveTo(history.state?.top ?? 0);
      if (earlier !== null) setFocus(0);
    }
  }, [query, rows.loading, scroll.width]);

  // Wider or narrower, the same clips stay in sight.
  const anchor = useRef({ columns, step, index: 0 });
  useLayoutEffect(() => {
    const { columns: before, step: stepBefore, index } = anchor.current;
    if (before !== columns || stepBefore !== step) {
      if (scroll.width && index > 0) scroll.moveTo(Math.floor(index / columns) * step);
      anchor.current = { columns, step, index };
    } else anchor.current.index = Math.round(scroll.top / step) * columns;
  });

  useEffect(() => onFound({ total: rows.total, ms: rows.ms, loading: rows.loading }), [rows.total, rows.ms, rows.loading]);

  useLayoutEffect(() => {
    if (moved.current === null) return;
    const link = scroll.box.current.querySelector(`[data-index="${moved.current}"]`);
    if (link) {
      link.focus({ preventScroll: true });
      moved.current = null;
    }
  });

  function move(to) {
    if (!total) return;
    const index = Math.max(0, Math.min(total - 1, to));
    const top = Math.floor(index / columns) * step;
    if (top < scroll.top) scroll.moveTo(top);
    else if (top + step + GAP > scroll.top + scroll.view) scroll.moveTo(top + step + GAP - scroll.view);
    moved.current = index;
    setFocus(index);
  }
  const screen = Math.max(1, Math.floor(scroll.view / step)) * columns;
  useKeys("Grid", [
    { keys: ["ArrowRight"], show: "→", does: "next clip", run: () => move(focus + 1) },
    { keys: ["ArrowLeft"], show: "←", does: "clip before", run: () => move(focus - 1) },
    { keys: ["ArrowDown"], show: "↓", does: "row below", run: () => move(focus + columns) },
    { keys: ["ArrowUp"], show: "↑", does: "row above", run: () => move(focus - columns) },
    { keys: ["PageDown"], show: "PgDn", does: "a screen down", run: () => move(focus + screen) },
    { keys: ["PageUp"], show: "PgUp", does: "a screen up", run: () => move(focus - screen) },
    { keys: ["Home"], show: "Home", does: "first", run: () => move(0) },
    { keys: ["End"], show: "End", does: "last", run: () => move(total - 1) },
    { keys: [], show: "Enter", does: "open the clip" },
  ]);

  const indices = Array.from({ length: Math.max(0, to - from) }, (_, k) => from + k);
  return html`<div class="scroller" ref=${scroll.box} aria-busy=${rows.loading}>
    ${
      rows.error &&
      html`<div class="message" role="alert">
        <p>${rows.error}</p>
        ${hasFilters(state) && html`<button onClick=${() => go(noFilters(state))}>Show all clips</button>`}
      </div>`
    }
    ${
      !rows.error && rows.total === 0 &&
      html`<div class="message">
        <p>${hasFilters(state) ? "No clip passes these filters." : "There is no clip in this run yet."}</p>
        ${hasFilters(state) && html`<button onClick=${() => go(noFilters(state))}>Show all clips</button>`}
      </div>`
    }
    <div class="tall" style=${{ height: `${scroll.height}px` }}>
      <div
        class="cards"
        role="list"
        aria-label="Clips"
        style=${{ top: `${first * step + GAP - scroll.shift}px`, gridTemplateColumns: `repeat(${columns}, 1fr)`, gridAutoRows: `${step - GAP}px` }}
      >
        ${indices.map((index) => {
          const row = rows.row(index);
          return html`<${Card}
            key=${row?.id ?? index}
            row=${row}
            index=${index}
            href=${row && address(changed(state, { clip: row.id, at: String(index) }))}
            focusable=${index === focus || (index === from && (focus < from || focus >= to))}
            onFocus=${setFocus}
          />`;
        })}
      </div>
    </div>
  </div>`;
}
