// What the server would answer, worked out over the clips that a page carries with it.

const TEXTS = { bucket: "bucket", source: "source" };

function value(clip, column) {
  if (typeof clip[column] === "number") return clip[column];
  if (column === "flag_count") return clip.flags.length;
  if (column === "captions") return clip.captions.length;
  if (column === "words") return (clip.caption ?? "").split(/\s+/).filter(Boolean).length;
  if (column.startsWith("caption.")) return clip.captions.find((c) => c.chosen)?.scores?.[column.slice(8)] ?? null;
  return clip.scores?.[column] ?? clip.scores?.[column.replace(/^score_/, "")] ?? null;
}

function says(clip) {
  const meta = Object.values(clip.meta ?? {});
  return [clip.name, ...clip.captions.map((c) => c.text), ...(clip.text ?? []), ...meta].join("\n").toLowerCase();
}

// Whether a clip passes a filter; `like` has been turned into a set of ids by then.
const TESTS = {
  q: (clip, words) => words.toLowerCase().split(/\s+/).every((word) => says(clip).includes(word)),
  kept: (clip, kept) => clip.kept === (kept === "1"),
  rule: (clip, name) => clip.dropped_by.includes(name),
  model: (clip, name) => clip.model === name,
  has: (clip, name) => clip.captions.some((c) => c.model === name && c.text),
  flag: (clip, name) => clip.flags.includes(name),
  like: (clip, id, all) => clip.id === id || near(all, id).has(clip.id),
  voted: (clip, kind) => votesOf(clip, kind),
};

function near(all, id) {
  return new Map((all.find((clip) => clip.id === id)?.neighbours ?? []).map((n) => [n.id, n.similarity]));
}

function votesOf(clip, kind) {
  const kinds = (clip.votes ?? []).map((vote) => vote.kind);
  if (kind === "none") return kinds.length === 0;
  return kind === "any" ? kinds.length > 0 : kinds.includes(kind);
}

function chosen(clips, query, except = "") {
  const tests = [];
  for (const name of new Set(query.keys())) {
    if (name === except) continue;
    const test = TESTS[name] ?? (TEXTS[name] && ((clip, text) => clip[TEXTS[name]] === text));
    const values = query.getAll(name).filter(Boolean);
    if (test && values.length) tests.push((clip) => values.some((text) => test(clip, text, clips)));
  }
  for (const [name, text] of query) {
    if (name === "range") {
      const [, column, low, high] = /^(.*):([^:]*):([^:]*)$/.exec(text);
      if (column === except) continue;
      tests.push((clip) => {
        const x = value(clip, column);
        return x !== null && (low === "" || x >= Number(low)) && (high === "" || x <= Number(high));
      });
    } else if (name === "text") throw new Error("A page that was sent cannot search by meaning: use words.");
  }
  return clips.filter((clip) => tests.every((test) => test(clip)));
}

// The same order for the same seed: a small integer hash of the id (FNV-1a).
function shuffled(id, seed) {
  let hash = 2166136261 ^ seed;
  for (const letter of id) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  return hash >>> 0;
}

function sorted(clips, sort, all, like) {
  let key = null;
  let down = false;
  if (sort?.startsWith("random")) key = (clip) => shuffled(clip.id, Number(sort.split(":")[1] ?? 0));
  else if (sort === "source") key = (clip) => clip.source;
  else if (sort) {
    down = sort.startsWith("-");
    key = (clip) => value(clip, sort.replace(/^-/, ""));
  } else if (like) {
    const similarity = near(all, like);
    key = (clip) => (clip.id === like ? 2 : similarity.get(clip.id));
    down = true;
  }
  if (!key) return clips;
  const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  return clips
    .map((clip) => [key(clip), clip])
    .sort(([a], [b]) => (a === null ? 1 : b === null ? -1 : down ? order(b, a) : order(a, b)))
    .map(([, clip]) => clip);
}

function row(clip) {
  const votes = { best: {}, bad: 0, edit: 0, keep: 0, drop: 0 };
  for (const { kind, model } of clip.votes ?? []) {
    if (kind === "best") votes.best[model] = (votes.best[model] ?? 0) + 1;
    else votes[kind] += 1;
  }
  return { ...clip, votes, stills: clip.images.length };
}

function histogram(clips, query) {
  const column = query.get("column");
  const bins = Number(query.get("bins") ?? 40);
  const found = chosen(clips, query, column).map((clip) => [value(clip, column), clip.kept]);
  const numbers = found.filter(([x]) => x !== null);
  const every = clips.map((clip) => value(clip, column)).filter((x) => x !== null);
  const [low, high] = [Math.min(...every), Math.max(...every)];
  const step = (high - low) / bins || 1;
  const result = { counts: Array(bins).fill(0), kept: Array(bins).fill(0), missing: found.length - numbers.length };
  for (const [x, kept] of numbers) {
    const bin = Math.min(bins - 1, Math.floor((x - low) / step));
    result.counts[bin] += 1;
    if (kept) result.kept[bin] += 1;
  }
  return { ...result, edges: Array.from({ length: bins + 1 }, (_, k) => low + k * step) };
}

// Of a filter that is set by the others, so that what else may be chosen keeps its count.
function facets(clips, query) {
  const result = { models: {}, flags: {}, rules: {}, sources: {}, buckets: {}, kept: {} };
  const add = (kind, name) => name != null && (result[kind][name] = (result[kind][name] ?? 0) + 1);
  const of = (name) => chosen(clips, query, name);
  for (const clip of of("model")) add("models", clip.model);
  for (const clip of of("source")) add("sources", clip.source);
  for (const clip of of("bucket")) add("buckets", clip.bucket);
  for (const clip of of("kept")) add("kept", clip.kept ? 1 : 0);
  for (const clip of of("flag")) clip.flags.forEach((flag) => add("flags", flag));
  for (const clip of of("rule")) clip.dropped_by.forEach((rule) => add("rules", rule));
  return result;
}

export function answer(data, path) {
  const [where, search = ""] = path.split("?");
  const query = new URLSearchParams(search);
  const route = where.replace(/^\/?api\//, "");
  if (route === "run") return { ...data.run, voting: false, text_search: false };
  if (route === "funnel") return { rules: data.rules };
  if (route === "histogram") return histogram(data.clips, query);
  if (route === "facets") return facets(data.clips, query);
  if (route === "clips") {
    const found = sorted(chosen(data.clips, query), query.get("sort"), data.clips, query.get("like"));
    const offset = Number(query.get("offset") ?? 0);
    return { total: found.length, rows: found.slice(offset, offset + Number(query.get("limit") ?? 50)).map(row) };
  }
  const clip = data.clips.find((clip) => clip.id === decodeURIComponent(route.replace("clip/", "")));
  if (!clip) throw new Error("This clip is not among those that the page carries.");
  return { ...clip, stills: clip.images.length, sample_times: [] };
}
