"""The captioner, and the judge, that ask any OpenAI-compatible server: vLLM, SGLang, `transformers serve`, hosted ones.

A clip is sent as its sampled frames (`images`, with their times in words), as its mp4 (`video`), or as its frames with
exact times (`jpegs`, vLLM's `video/jpeg`). The request has the fields of the recipe's `parameters` and no others, but
for what these forms, `enforce` and the judge need: media_io_kwargs, response_format, logprobs.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from models.language.times import plain
from pipeline.caption import client, prompts, structured
from pipeline.caption.answers import Answer, Server, total
from pipeline.caption.captioner import Captioner, Said
from pipeline.caption.judge import Judge, Judged, Told, Verdict
from pipeline.caption.text import sentences
from pipeline.faults import ClipFault, Fault, StoreError, WorkerFault
from pipeline.io.store import Ranges
from pipeline.recipe_captions import ServedCaptioner, ServedModel
from pipeline.recipe_choose import ServedYesJudge
from pipeline.recipe_schema import RecipeError
from pipeline.record import Caption, Clip, Video
from pipeline.samples import samples, spread
from pipeline.stages import Resources

Content = list[dict[str, Any]]

# It waits for another machine most of the time. One worker: what is to be bounded is what the server is asked.
WAITING = Resources(cpus=0.5, max_workers=1)
TICKS = 1000  # a second, in which the times of `jpegs` are told


def check(options: ServedModel, where: str) -> str:
    """Where the model is. Raises RecipeError where its key is missing; the server is asked in `setup`."""
    try:
        client.key(options)
    except RecipeError as e:
        raise RecipeError(f"{where}: {e}") from e
    return f"served at {options.url}"


# ---------------------------------------------------------------- what is sent of a clip


def frames(video: Video, clip: Clip, n: int) -> tuple[list[bytes], list[float]]:
    """At most n sampled frames of a clip, spread over it: JPEGs, and seconds from its start."""
    chosen = spread(samples(video, clip), n)
    return [s.jpeg for s in chosen], [video.time_of(s.frame) - clip.start_s for s in chosen]


def images(jpegs: Sequence[bytes], detail: str | None = None) -> Content:
    """Frames one by one."""
    more = {"detail": detail} if detail else {}
    return [{"type": "image_url", "image_url": {"url": _url("image/jpeg", j), **more}} for j in jpegs]


def _url(kind: str, *data: bytes) -> str:
    return f"data:{kind};base64,{','.join(base64.b64encode(d).decode() for d in data)}"


def _as_video(jpegs: Sequence[bytes], times_s: Sequence[float], duration_s: float) -> tuple[Content, Any]:
    """Frames as a video that the server does not sample again, and the field that says when each is.

    A time is frames_indices ÷ fps there: ticks of a thousandth of a second are exact for variable frame rates too.
    """
    said = {
        "num_frames": -1,
        "fps": TICKS,
        "frames_indices": [round(t * TICKS) for t in times_s],
        "total_num_frames": max(round(duration_s * TICKS), round(times_s[-1] * TICKS) + 1),
        "duration": duration_s,
        "do_sample_frames": False,
    }
    return [{"type": "video_url", "video_url": {"url": _url("video/jpeg", *jpegs)}}], {"video": said}


# ---------------------------------------------------------------- the captioners


def without_thoughts(text: str) -> str:
    """What a thinking model says, where its server leaves the thoughts in the answer."""
    from models.curation.vlm import reasoning

    return reasoning.said(text).strip()


class Asking(Captioner):
    """A captioner that asks a server about each clip: `said` does, in a thread; see `Server` for what is kept."""

    options: Any
    resources = WAITING
    bounded = True
    asks: Server | None = None

    def __init__(self, options: Any):
        super().__init__(options)
        self.name = options.name or options.model
        self.batch = options.batch

    def check(self) -> str:
        return check(self.options, "captions")

    def setup(self) -> None:
        self.asks = Server(self.options, self.store)
        self.asks.client.hello()

    def caption_batch(self, clips: list[tuple[Video, Clip]]) -> list[Said]:
        assert self.asks is not None
        return list(self.asks.each([partial(self.said, video, clip) for video, clip in clips]))

    def said(self, video: Video, clip: Clip, stop: threading.Event) -> Caption:
        """What the model says of one clip. Raises ClipFault."""
        raise NotImplementedError

    def caption_of(self, answers: Sequence[Answer], prompt: str) -> Caption:
        """The last of the answers to a clip as its caption; all of them cost."""
        answer = answers[-1]
        text = without_thoughts(answer.text)
        raw = answer.text if text != answer.text else ""
        caption = Caption(self.name, text, prompt=prompt, raw=raw, cost=total(a.cost for a in answers))
        if answer.finish == "length":
            caption.outcome = "truncated"
            if not text:
                caption.reason = "it was cut off before it said anything: raise parameters.max_tokens"
        if answer.refusal or answer.finish == "content_filter":
            caption.flags.append("refusal")
            caption.text, caption.raw = "", answer.refusal or answer.text
        return caption


class Served(Asking):
    """See ServedCaptioner for the options."""

    options: ServedCaptioner

    def setup(self) -> None:
        super().setup()
        self._lock = threading.Lock()
        self._ranges = Ranges(self.store) if self.store is not None else None

    def said(self, video: Video, clip: Clip, stop: threading.Event) -> Caption:
        assert self.asks is not None
        o = self.options
        content: Content
        more: dict[str, Any] = {"response_format": structured.response_format()} if o.enforce else {}
        times = ""
        if o.input == "video":
            content = [{"type": "video_url", "video_url": {"url": _url("video/mp4", self._mp4(clip))}}]
        else:
            jpegs, when = frames(video, clip, o.frames)
            if not jpegs:  # no sampled frame lies in it
                return Caption(self.name, "")
            content = images(jpegs, o.detail)
            times = plain(when, clip.duration_s)
            if o.input == "jpegs":
                content, more["media_io_kwargs"] = _as_video(jpegs, when, clip.duration_s)
                times = ""
        prompt = self._prompt(video, clip)
        content = [*content, {"type": "text", "text": f"{times}\n{prompt}" if times else prompt}]
        body = self.asks.body(content, **more)
        answers = [self.asks.ask(clip.clip_id, body, stop)]
        if not o.structured:
            return self.caption_of(answers, prompt)
        return self._structured(clip, body, answers, prompt, stop)

    def _prompt(self, video: Video, clip: Clip) -> str:
        given = self.options.context
        context = tuple(prompts.SAID) if given is True else given or ()
        more = {"schema": structured.schema_text()} if self.options.structured else None
        return prompts.ask(self.options.prompt, video, clip, context, more=more)

    def _structured(
        self, clip: Clip, body: dict[str, Any], answers: list[Answer], prompt: str, stop: threading.Event
    ) -> Caption:
        """The text of the record that the model gives, once it is asked to mend what is wrong with it."""
        assert self.asks is not None
        for mended in (False, True):
            caption = self.caption_of(answers, prompt)
            said = without_thoughts(answers[-1].text)
            if "refusal" in caption.flags:
                return caption
            try:
                record = structured.measured(structured.parse(said), clip.scores)
            except structured.Broken as e:
                if not mended:
                    wrong = (
                        f"This is not the JSON object asked for: {e}. Answer with the corrected object alone."
                    )
                    again = [
                        *body["messages"],
                        {"role": "assistant", "content": said},
                        {"role": "user", "content": wrong},
                    ]
                    answers.append(self.asks.ask(clip.clip_id, body | {"messages": again}, stop))
                continue
            caption.outcome = "ok"  # whatever came after it
            caption.text, caption.raw = structured.text(record), said
            return caption
        # no error: asked again, it would say the same, and be paid for
        caption.text, caption.raw, caption.outcome = "", answers[-1].text, "empty"
        caption.flags.append("broken_json")
        return caption

    def _mp4(self, clip: Clip) -> bytes:
        if clip.media is None or self._ranges is None:
            raise ClipFault("input video: the clip has no mp4")
        with self._lock:
            return self._ranges.read(clip.media.tar, clip.media.offset, clip.media.size, clip.media.sha256)


# ---------------------------------------------------------------- the judge


class ServedYes(Judge):
    """P(Yes) ÷ (P(Yes) + P(No)) of an answer's first token (VQAScore, arXiv 2404.01291), by a server's logprobs."""

    options: ServedYesJudge
    resources = WAITING

    def __init__(self, options: ServedYesJudge):
        super().__init__(options)
        self.name, self.batch = options.name, options.concurrency

    def check(self) -> str:
        return check(self.options, "choose.judges")

    def setup(self) -> None:
        self.asks = Server(self.options, self.store)
        self.asks.client.hello()
        try:
            answer = self.asks.ask("", self._body([], "Is water wet? Please answer yes or no."))
        except (StoreError, WorkerFault):
            raise
        except Fault as e:
            raise RecipeError(f"choose.judges: {e}") from e
        if not answer.logprobs:
            raise RecipeError(
                f"choose.judges: {self.options.url} gives no logprobs, which this judge reads ('transformers serve' "
                "gives none): serve the model by vLLM or SGLang, or judge by a model in the process"
            )

    def scores(self, told: list[Told]) -> list[Sequence[Verdict]]:
        """Raises the first fault of a clip: the stage finds the culprit, and what is answered is not asked again."""
        verdicts: list[Sequence[Verdict]] = []
        for found in self.asks.each([partial(self._verdicts, t) for t in told]):
            if isinstance(found, ClipFault):
                raise found
            verdicts.append(found)
        return verdicts

    def _verdicts(self, told: Told, stop: threading.Event) -> list[Verdict]:
        jpegs, when = frames(told.video, told.clip, self.options.frames)
        if not jpegs:
            return [None] * len(told.texts)
        times = plain(when, told.clip.duration_s)

        def p(text: str) -> float | None:
            words = f"{times}\n{self.options.question.replace('{caption}', text)}".strip()
            return p_yes(self.asks.ask(told.clip.clip_id, self._body(images(jpegs), words), stop))

        found: list[Verdict] = []
        for text in told.texts:
            score = p(text)
            parts = sentences(text) if self.options.sentences else []
            support = [score if len(parts) == 1 else p(s) for s in parts]
            if score is None or any(s is None for s in support):
                found.append(score)
            else:
                found.append(Judged(score, [s for s in support if s is not None]))
        return found

    def _body(self, content: Content, words: str) -> dict[str, Any]:
        more = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        if "max_completion_tokens" in self.options.parameters:
            del more["max_tokens"]
        return self.asks.body([*content, {"type": "text", "text": words}], **more)


def p_yes(answer: Answer) -> float | None:
    """P(Yes) ÷ (P(Yes) + P(No)) at the first token; None where it is neither, or no logprobs are given."""
    if not answer.logprobs:
        return None
    first = answer.logprobs[0]
    listed = {str(t.get("token")): t.get("logprob") for t in [first, *(first.get("top_logprobs") or [])]}
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in listed.items():
        word = token.strip(" ▁Ġ\n.\"'“”").lower()
        if word in mass and isinstance(logprob, int | float) and not math.isnan(logprob):
            mass[word] += math.exp(min(0.0, logprob))
    both = mass["yes"] + mass["no"]
    return mass["yes"] / both if both > 0 else None
