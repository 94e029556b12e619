"""The world model: LLaMA's numbers, isolated documents, a cache that changes nothing."""

import json

import msgpack
import pytest
import torch

from models.attention import choose_kernel
from models.language import llama
from models.language.layout import Layout, Part
from models.language.loss import Goal, documents, shifted, token_weights
from models.language.world import Goals, Places, World, build

SIZES = {"dim": 32, "ffn": 48, "heads": 4, "groups": 2, "depth": 2, "theta": 1e6}
WORDS, CODES = 300, 24
LAYOUT = Layout.of_bytes(codes=16, frame=4)


def world(**options) -> World:
    torch.manual_seed(0)
    model = World(WORDS, CODES, **SIZES | options).eval()
    for p in model.parameters():  # logits that differ
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def frames(n: int, seed: int = 0):
    return torch.randint(16, (n, 4), generator=torch.Generator().manual_seed(seed))


DOCUMENTS = [
    ["a cat", frames(2)],
    [Part(frames(1, 1), learnt=False), "a long story of a dog"],
    ["text alone"],
]


def packed(pad: int = 3):
    laid = [LAYOUT.lay_out(parts) for parts in DOCUMENTS]
    lengths = [x.length for x in laid]
    tokens, vision, learnt = (
        torch.cat([*(x[i] for x in laid), torch.zeros(pad, dtype=laid[0][i].dtype)]) for i in range(3)
    )
    return tokens, vision, learnt, lengths


# ---------------------------------------------------------------- LLaMA


def published(tied: bool = False, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_published_llama_gives_the_same_logits(tmp_path, tied: bool):
    theirs = published(tied, rope_parameters={"rope_type": "default", "rope_theta": 5e7})
    theirs.save_pretrained(tmp_path)
    model = build(WORDS, CODES, weights=str(tmp_path)).eval()
    assert model.theta == 5e7
    tokens = torch.randint(WORDS, (2, 40))
    torch.testing.assert_close(model(tokens).text, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_files_and_older_pickles_are_read(tmp_path):
    theirs = published()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "old").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "old/pytorch_model.bin")
    config = json.loads((tmp_path / "sharded/config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    tokens = torch.randint(WORDS, (1, 9))
    for name in ("sharded", "old"):
        model = build(WORDS, None, weights=str(tmp_path / name)).eval()
        torch.testing.assert_close(model(tokens).text, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_what_is_saved_loads_here_with_its_visual_half_and_there_as_a_model_of_text(tmp_path, tied: bool):
    from transformers import LlamaForCausalLM

    model = world(tied=tied)
    llama.save(model, tmp_path)
    tokens, vision, _, _ = packed()
    again = build(WORDS, CODES, weights=str(tmp_path)).eval()
    for a, b in zip(again(tokens[None], vision[None]), model(tokens[None], vision[None]), strict=True):
        assert torch.equal(a, b)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    words = torch.randint(WORDS, (2, 30))
    torch.testing.assert_close(theirs(words).logits, model(words).text, atol=1e-5, rtol=1e-5)


def test_weights_that_do_not_fit_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        build(WORDS, weights=str(tmp_path))
    llama.save(world(), tmp_path)
    with pytest.raises(ValueError, match="knows 300 text tokens"):
        build(WORDS + 1, weights=str(tmp_path))
    with pytest.raises(ValueError, match="leave depth out"):
        build(WORDS, CODES, weights=str(tmp_path), depth=3)
    with pytest.raises(ValueError, match="give codes=24"):
        build(WORDS, CODES + 1, weights=str(tmp_path))
    assert build(WORDS, CODES, weights=str(tmp_path), theta=5e7).theta == 5e7
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "llama3"}}))
    with pytest.raises(ValueError, match="rope_scaling"):
        build(WORDS, weights=str(tmp_path))


# ---------------------------------------------------------------- Large World Model's own files


def flax_array(x, chunk: int | None = None) -> bytes:
    """As flax.serialization.to_bytes writes it; chunk: in pieces of so many values, as it does above 1 GiB."""

    def packed(x):
        told = (tuple(x.shape), "bfloat16" if x.dtype == torch.bfloat16 else "float32", raw(x))
        return msgpack.ExtType(1, msgpack.packb(told, use_bin_type=True))

    def raw(x) -> bytes:
        return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""

    if chunk is None:
        return msgpack.packb(packed(x))
    pieces = {str(i): packed(piece) for i, piece in enumerate(x.flatten().split(chunk))}
    shape = {str(i): n for i, n in enumerate(x.shape)}
    return msgpack.packb({"__msgpack_chunked_array__": True, "shape": shape, "chunks": pieces})


def stream(theirs, path, dtype, scanned: bool, vision: bool = True) -> dict[str, torch.Tensor]:
    """LlamaForCausalLM's weights in Large World Model's form, with visual ones; → these."""
    state = {k: v.to(dtype) for k, v in theirs.state_dict().items()}
    seen = {"vision_embed.weight": torch.randn(CODES, 32), "vision_head.weight": torch.randn(CODES, 32)}

    def neighbours(w):  # rows of halves (i, i + W/2) to (2i, 2i + 1), head by head
        order = torch.arange(8).view(2, 4).T.flatten()
        return torch.cat([head[order] for head in w.split(8)])

    layers = []
    for i in range(2):
        own = {k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if f".layers.{i}." in k}
        attention = {n: own[f"self_attn.{n}_proj.weight"] for n in "qkvo"}
        attention |= {n: neighbours(attention[n]) for n in "qk"}
        layer = {("attention", f"w{n}", "kernel"): w.T for n, w in attention.items()}
        layer[("attention_norm", "kernel")] = own["input_layernorm.weight"]
        layer[("ffn_norm", "kernel")] = own["post_attention_layernorm.weight"]
        for ours, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            layer[("feed_forward", ours, "kernel")] = own[f"mlp.{name}_proj.weight"].T
        layers.append(layer)
    records = {
        ("transformer", "wte", "embedding"): state["model.embed_tokens.weight"],
        ("transformer", "ln_f", "kernel"): state["model.norm.weight"],
        ("lm_head", "kernel"): state["lm_head.weight"].T,
    }
    if vision:
        records[("transformer", "vte", "embedding")] = seen["vision_embed.weight"]
        records[("vision_head", "kernel")] = seen["vision_head.weight"].T
    for name in layers[0]:
        if scanned:
            records[("transformer", "h", "scan_decoder", *name)] = torch.stack([x[name] for x in layers])
        else:
            records |= {("transformer", "h", str(i), *name): x[name] for i, x in enumerate(layers)}
    with open(path, "wb") as file:
        for i, (key, x) in enumerate(records.items()):
            key = key if scanned else ("params", *key)
            file.write(msgpack.packb((key, flax_array(x, chunk=100 if i % 2 else None))))
    return seen


@pytest.mark.parametrize(("dtype", "scanned"), [(torch.float32, True), (torch.bfloat16, False)])
@torch.no_grad()
def test_large_world_models_own_files_give_llamas_logits_and_their_visual_half(
    tmp_path, dtype, scanned: bool
):
    theirs = published(rope_parameters={"rope_type": "default", "rope_theta": 5e7})
    for p in theirs.parameters():
        p.copy_(p.to(dtype))
    seen = stream(theirs, tmp_path / "streaming_params", dtype, scanned)
    model = build(WORDS, CODES, weights=str(tmp_path / "streaming_params"), heads=4).eval()
    model.norm.eps = 1e-5
    for block in model.blocks:
        block.attention_norm.eps = block.mlp_norm.eps = 1e-5  # theirs here; the file's models have 1e-6
    tokens = torch.randint(WORDS, (2, 30))
    torch.testing.assert_close(model(tokens).text, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    for name, x in seen.items():
        assert torch.equal(model.state_dict()[name], x)


@torch.no_grad()
def test_files_of_a_model_of_text_leave_the_visual_half_at_random_and_other_files_are_refused(tmp_path):
    path = tmp_path / "streaming_params"
    stream(published(), path, torch.float32, True, vision=False)
    assert build(WORDS, CODES, weights=str(path), heads=4).vision_head.weight.shape == (CODES, 32)
    whole = path.read_bytes()
    for content, told in ((whole[:3000], "lacks"), (b"no weights at all", "not a stream"), (b"", "lacks")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            build(WORDS, CODES, weights=str(path), heads=4)


# ---------------------------------------------------------------- packing


def goals(tokens, vision, learnt, lengths) -> tuple[Goals, dict[str, int]]:
    """Of a packed row, and how many documents have something of each kind to learn."""
    targets, learnt, seen = shifted(tokens, lengths), shifted(learnt, lengths), shifted(vision, lengths)
    kinds = {"text": learnt & ~seen, "vision": learnt & seen}
    made = {kind: Goal.of(targets, token_weights(lengths, marks)) for kind, marks in kinds.items()}
    return Goals(**made), {kind: documents(lengths, marks) for kind, marks in kinds.items()}


def loss_of(model: World, row) -> torch.Tensor:
    """½ (vision + text), each the mean over the documents that have some."""
    tokens, vision, _, lengths = row
    wanted, counts = goals(*row)
    places = Places.packed(lengths, len(tokens))
    said = model(tokens[None], vision[None], places, goals=wanted)
    return sum(x / max(counts[kind], 1) for kind, x in zip(counts, said, strict=True)) / 2


def test_packed_loss_and_gradients_equal_the_mean_of_the_unpacked():
    """Cross-entropy of each document's own logits, computed alone and by torch."""
    model = world()
    losses = {"text": [], "vision": []}
    for parts in DOCUMENTS:
        tokens, vision, learnt = LAYOUT.lay_out(parts)
        said = model(tokens[None, :-1], vision[None, :-1])
        for kind, logits, kind_of in zip(losses, said, (~vision, vision), strict=True):
            marks = (learnt & kind_of)[1:]
            if marks.any():
                losses[kind].append(torch.nn.functional.cross_entropy(logits[0][marks], tokens[1:][marks]))
    assert [len(x) for x in losses.values()] == [3, 1]
    alone = sum(torch.stack(x).mean() for x in losses.values()) / 2
    together = loss_of(model, packed())
    torch.testing.assert_close(together, alone)
    pairs = [torch.autograd.grad(x, list(model.parameters())) for x in (together, alone)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["auto", "plain", "flex"])
@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(kernel):
    model = world()
    choose_kernel(model, kernel)
    tokens, vision, _, lengths = packed()
    said = model(tokens[None], vision[None], Places.packed(lengths, len(tokens)))
    start = 0
    for parts, length in zip(DOCUMENTS, lengths, strict=True):
        own, seen, _ = LAYOUT.lay_out(parts)
        for a, b in zip(said, model(own[None], seen[None]), strict=True):
            torch.testing.assert_close(a[:, start : start + length], b, atol=1e-5, rtol=1e-5)
        start += length


@torch.no_grad()
def test_editing_a_document_leaves_the_others_as_they_are():
    model = world()
    tokens, vision, _, lengths = packed()
    places = Places.packed(lengths, len(tokens))
    before = model(tokens[None], vision[None], places).text[0]
    edited = tokens.clone()
    middle = slice(lengths[0], lengths[0] + lengths[1])
    edited[middle] = edited[middle].roll(1) % 16
    after = model(edited[None], vision[None], places).text[0]
    same = torch.ones(len(tokens), dtype=torch.bool)
    same[middle] = False
    assert torch.equal(before[same], after[same])
    assert not torch.allclose(before[middle], after[middle])


@torch.no_grad()
def test_rows_may_be_packed_differently():
    model = world()
    tokens, vision, _, lengths = packed()
    rows = torch.stack([tokens, tokens.roll(7)]), torch.stack([vision, vision.roll(7)])
    both = model(*rows, Places.packed([lengths, [7, *lengths[:2]]], len(tokens)))
    for i, own in enumerate((lengths, [7, *lengths[:2]])):
        one = model(rows[0][i : i + 1], rows[1][i : i + 1], Places.packed(own, len(tokens)))
        torch.testing.assert_close(both.text[i : i + 1], one.text, atol=1e-5, rtol=1e-5)


def test_a_batch_without_visual_tokens_gives_every_weight_a_gradient():
    """As data parallel training needs it."""
    model, laid = world(), LAYOUT.lay_out(["text alone"])
    loss_of(model, (*laid, [laid.length])).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_a_number_is_another_token_as_text_and_as_a_code():
    model, tokens = world(), torch.full((1, 4), 7)
    as_text, as_codes = model(tokens), model(tokens, torch.ones(1, 4, dtype=torch.bool))
    assert not torch.allclose(as_text.text, as_codes.text)


@torch.no_grad()
def test_theta_turns_later_positions_less():
    """Of the same weights: at position 0 nothing differs."""
    small, large, tokens = world(theta=1e4), world(theta=5e7), torch.randint(WORDS, (1, 12))
    a, b = small(tokens).text, large(tokens).text
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert not torch.allclose(a[:, 1:], b[:, 1:])


def test_text_alone_has_no_visual_half():
    model = World(WORDS, None, **SIZES)
    assert model(torch.zeros(1, 3, dtype=torch.long)).vision is None
    with pytest.raises(ValueError, match="text alone"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("sizes", [{"heads": 5}, {"groups": 3}, {"head": 7}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"divi|even width"):
        World(WORDS, CODES, **SIZES | sizes)


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]])
@torch.no_grad()
def test_cached_equals_uncached(pieces):
    model = world()
    tokens, vision = torch.randint(CODES, (3, 12)), torch.rand(3, 12) < 0.5
    whole, cache = model(tokens, vision), model.cache(20)
    parts = [
        model(t, v, cache=cache)
        for t, v in zip(tokens.split(pieces, 1), vision.split(pieces, 1), strict=True)
    ]
    for i in range(2):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], dim=1), whole[i], atol=1e-5, rtol=1e-5)
    assert cache.length == 12


@torch.no_grad()
def test_packed_documents_may_be_read_in_pieces():
    model = world()
    tokens, vision, _, lengths = packed()
    n = len(tokens)
    places, cache = Places.packed(lengths, n), model.cache(n)
    whole = model(tokens[None], vision[None], places).text
    cut = lengths[0] + 4
    parts = [
        model(tokens[None, a:b], vision[None, a:b], places.part(a, b), cache=cache).text
        for a, b in ((0, cut), (cut, n))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_full_cache_says_so():
    model = world()
    with pytest.raises(ValueError, match="made for 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=model.cache(4))
