// Words two texts share, by their longest common subsequence, and sentences that nothing supports.

// [{text, word, start}]: words with what joins them to the next, so that the pieces joined are the text.
export function tokens(text) {
  return Array.from(text.matchAll(/\S+\s*|^\s+/gu), (match) => ({
    text: match[0],
    start: match.index,
    word: match[0].trim().toLowerCase().replace(/^[\p{P}\p{S}]+|[\p{P}\p{S}]+$/gu, "") || match[0].trim(),
  }));
}

const TOO_MANY = 16e6; // cells of the table: 4,000 words against 4,000

// For words a and b, which are in the common subsequence: [bool a], [bool b], both of the length of their words.
function common(a, b) {
  const inA = new Array(a.length).fill(false);
  const inB = new Array(b.length).fill(false);
  let start = 0;
  let [endA, endB] = [a.length, b.length];
  while (start < endA && start < endB && a[start] === b[start]) inA[start] = inB[start++] = true;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) inA[--endA] = inB[--endB] = true;
  const [n, m] = [endA - start, endB - start];
  if (n * m > TOO_MANY) {
    // Longer than captions get: words that the other has at all.
    const [hasA, hasB] = [new Set(a), new Set(b)];
    return [a.map((word) => hasB.has(word)), b.map((word) => hasA.has(word))];
  }
  const length = new Uint16Array((n + 1) * (m + 1)); // [i, j]: of the subsequence of a[i:] and b[j:]
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      length[i * (m + 1) + j] =
        a[start + i] === b[start + j]
          ? length[(i + 1) * (m + 1) + j + 1] + 1
          : Math.max(length[(i + 1) * (m + 1) + j], length[i * (m + 1) + j + 1]);
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (a[start + i] === b[start + j]) inA[start + i++] = inB[start + j++] = true;
    else if (length[(i + 1) * (m + 1) + j] >= length[i * (m + 1) + j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

const ALIKE = 0.4; // texts that share fewer of their words are not versions of one another

// From one text to another: [{kind: "same" | "new" | "gone", text, start}]; `start` is the place in `to`, -1 of what is
// gone. null where the two have so little in common that every mark would be noise.
export function difference(from, to) {
  const [a, b] = [tokens(from), tokens(to)];
  const [inA, inB] = common(a.map((t) => t.word), b.map((t) => t.word));
  if (inB.filter(Boolean).length < ALIKE * Math.min(a.length, b.length)) return null;
  const pieces = [];
  let i = 0;
  for (let j = 0; j <= b.length; j++) {
    // Before a shared word, and at the end: what only the first text has there.
    if (j === b.length || inB[j]) {
      for (; i < a.length && !inA[i]; i++) pieces.push({ kind: "gone", text: a[i].text, start: -1 });
      i++;
    }
    if (j < b.length) pieces.push({ kind: inB[j] ? "same" : "new", text: b[j].text, start: b[j].start });
  }
  return pieces;
}

function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Sentences far below the others of a clip by any judge: 1.5 deviations under the median, over all its captions.
// → Map model → [[start, end, reason]], places in the caption's text. Fewer than four sentences tell nothing.
export function unsupported(captions) {
  const marks = new Map(captions.map((caption) => [caption.model, []]));
  const judges = new Set(captions.flatMap((caption) => Object.keys(caption.support ?? {})));
  for (const judge of judges) {
    const all = captions.flatMap((caption) => caption.support?.[judge] ?? []).filter((x) => Number.isFinite(x));
    if (all.length < 4) continue;
    const middle = median(all);
    const spread = 1.4826 * median(all.map((x) => Math.abs(x - middle))); // of a normal: one deviation
    const limit = middle - 1.5 * Math.max(spread, 1e-6);
    for (const caption of captions) {
      let place = 0;
      for (const [k, sentence] of (caption.sentences ?? []).entries()) {
        const start = caption.text.indexOf(sentence, place);
        if (start < 0) continue;
        place = start + sentence.length;
        const support = caption.support?.[judge]?.[k];
        if (Number.isFinite(support) && support < limit)
          marks.get(caption.model).push([start, place, `${judge} ${support.toFixed(2)}, the clip's median ${middle.toFixed(2)}`]);
      }
    }
  }
  return marks;
}
