// Votes: each is written down here before it is sent, sent at once, and sent again until the server has saved it.
import { html, useEffect, useRef, useState } from "./preact-htm.js";
import { post } from "./api.js";
import { Dialog } from "./keys.js";
import { recall, remember } from "./state.js";

const QUESTION = { best: "caption", bad: "caption", edit: "caption", keep: "keep", drop: "keep" };
const AGAIN_MS = 4000; // after a server that did not answer

// The votes that no server has confirmed yet; they outlive the page.
const queue = { list: recall("pending", []), sending: false, state: "", why: "", timer: 0 };
const listeners = new Set();
const tell = (saved = null) => listeners.forEach((listener) => listener(saved));

// Names a vote, so that one whose answer was lost counts once when it is sent again.
const named = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

function enqueue(vote) {
  queue.list.push({ id: named(), ...vote });
  remember("pending", queue.list);
  send();
}

export async function send() {
  if (queue.sending || !queue.list.length) return;
  clearTimeout(queue.timer);
  queue.sending = true;
  Object.assign(queue, { state: "saving", why: "" });
  tell();
  while (queue.list.length) {
    const [vote] = queue.list;
    try {
      const { votes } = await post("api/vote", vote);
      queue.list.shift();
      remember("pending", queue.list);
      Object.assign(queue, { state: queue.list.length ? "saving" : "saved", why: "" });
      tell({ clip: vote.clip, votes });
    } catch (error) {
      Object.assign(queue, { state: "failed", why: error.message });
      if (error.status && error.status < 500) {
        // Refused: sending it again would be refused again.
        queue.list.shift();
        remember("pending", queue.list);
      } else queue.timer = setTimeout(send, AGAIN_MS);
      break;
    }
  }
  queue.sending = false;
  tell();
}

// When the server has every vote, or has not answered for a while.
export async function settled() {
  for (let waited = 0; queue.list.length && waited < 1500; waited += 50) await new Promise((done) => setTimeout(done, 50));
}

export function usePending() {
  const [, redraw] = useState(0);
  useEffect(() => {
    const listener = () => redraw((n) => n + 1);
    listeners.add(listener);
    send();
    return () => listeners.delete(listener);
  }, []);
  return queue;
}

// Votes of a clip: those of the server, and over them those that it has not confirmed yet.
function listed(clip) {
  const votes = Array.isArray(clip?.votes) ? clip.votes : [];
  return queue.list.filter((v) => v.clip === clip?.id && v.kind !== "undo").reduce(over, votes);
}

function over(votes, vote) {
  const others = votes.filter((v) => v.who !== vote.who || QUESTION[v.kind] !== QUESTION[vote.kind]);
  return [...others, { at: new Date().toISOString(), ...vote }];
}

// {votes, mine, cast(kind, {model, text}), who, asking, name(who)} of one clip. The first vote asks who votes, once.
export function useVotes(clip) {
  const [votes, setVotes] = useState(() => listed(clip));
  const [who, setWho] = useState(() => recall("who", ""));
  const [asking, setAsking] = useState(null); // the vote that waits for a name, or {} to change the name
  const id = clip?.id;
  useEffect(() => setVotes(listed(clip)), [clip]);
  useEffect(() => {
    const listener = (saved) => saved && saved.clip === id && Array.isArray(saved.votes) && setVotes(saved.votes);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, [id]);

  function put(vote, name) {
    const full = { clip: id, ...vote, who: name };
    if (vote.kind !== "undo") setVotes((before) => over(before, full));
    enqueue(full);
  }
  const mineOf = (question) => votes.findLast?.((v) => v.who === who && QUESTION[v.kind] === question);
  return {
    votes,
    who,
    asking,
    mine: { caption: who && mineOf("caption"), keep: who && mineOf("keep") },
    cast(kind, more = {}) {
      if (who) put({ kind, ...more }, who);
      else setAsking({ kind, ...more });
      return Boolean(who);
    },
    rename: () => setAsking({}),
    // Whether the vote that waited for the name is cast.
    name(text) {
      if (text) {
        remember("who", text);
        setWho(text);
        if (asking.kind) put(asking, text);
      }
      setAsking(null);
      return Boolean(text && asking.kind);
    },
  };
}

export function Who({ who, onName }) {
  const input = useRef(null);
  // Set once by hand: what is being typed survives a redraw.
  useEffect(() => {
    input.current.value = who;
    input.current.select();
  }, []);
  return html`<${Dialog} label="Who votes" onClose=${() => onName("")}>
    <form onSubmit=${(event) => (event.preventDefault(), onName(input.current.value.split(/\s+/).filter(Boolean).join(" ")))}>
      <h2>Who votes?</h2>
      <p class="soft">Your name stands beside your votes, so that several people can judge the same clips. Asked once in this browser.</p>
      <label>Name <input ref=${input} maxlength="64" autocomplete="name" required autofocus /></label>
      <p class="row end"><button type="button" class="plain" onClick=${() => onName("")}>Cancel</button><button class="main">Vote</button></p>
    </form>
  <//>`;
}

export function Edit({ text, model, onSave, onClose }) {
  const input = useRef(null);
  useEffect(() => {
    input.current.value = text; // once, by hand: what is being typed survives a redraw
    input.current.focus();
    input.current.setSelectionRange(text.length, text.length);
  }, []);
  const save = () => {
    const said = input.current.value.trim();
    if (said) onSave(said);
  };
  return html`<${Dialog} label="Edit the caption" onClose=${onClose}>
    <form onSubmit=${(event) => (event.preventDefault(), save())}>
      <h2>Edit the caption</h2>
      ${model && html`<p class="soft">Starting from <bdi>${model}</bdi>. It is saved as a vote; the original stays.</p>`}
      <textarea
        ref=${input}
        aria-label="Caption"
        dir="auto"
        rows="7"
        maxlength="10000"
          onKeyDown=${(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && (event.preventDefault(), save())}
      />
      <p class="row end"><span class="soft small push-right">Ctrl Enter saves</span><button type="button" class="plain" onClick=${onClose}>Cancel</button><button class="main">Save</button></p>
    </form>
  <//>`;
}

// Whether the votes are safe: said at once, in words.
export function Saved() {
  const { list, state, why } = usePending();
  if (state === "failed" && list.length)
    return html`<span class="saved failed" role="alert">${list.length === 1 ? "1 vote is" : `${list.length} votes are`} not saved yet: ${why}. Kept here, tried again. <button class="plain" onClick=${send}>Try now</button></span>`;
  if (state === "failed") return html`<span class="saved failed" role="alert">Not saved: ${why}</span>`;
  return html`<span class="saved" role="status">${state === "saving" ? "saving …" : state === "saved" ? "✓ saved" : ""}</span>`;
}
