"""What the plugin makes of an engine's arguments, before anything is started."""

import pytest
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs

from flux_attention import FluxConfig, adapters
from flux_attention.errors import AdapterError, FluxConfigError, ServingError
from flux_attention.names import BACKBONE, ROUTERS
from flux_attention.serving import model, plugin
from flux_attention.serving.backend import RoutedAttention
from flux_attention.serving.settings import VARIABLE


@pytest.fixture(autouse=True)
def registered():
    plugin.register()
    plugin.register()  # as often as vLLM likes


def config(**arguments):
    return EngineArgs(str(BACKBONE), enforce_eager=True, max_model_len=512, **arguments).create_engine_config()


def routed(budget=None, routers="shipped", **arguments):
    return config(additional_config={"flux_attention": {"routers": str(routers), "budget": budget}}, **arguments)


def test_without_an_adapter_nothing_is_changed(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    made = config()
    assert "flux" not in made.parallel_config.worker_cls and made.scheduler_config.scheduler_cls is None
    assert "flux_attention" not in (made.additional_config or {})


def test_an_adapter_turns_routing_on(monkeypatch):
    monkeypatch.setenv(VARIABLE, "shipped")
    for made in (config(), routed()):
        assert made.parallel_config.worker_cls == plugin.WORKER
        assert made.scheduler_config.scheduler_cls == plugin.SCHEDULER.format("")
        assert made.additional_config["flux_attention"]["routers"] == "shipped"
        assert made.cache_config.enable_prefix_caching is False


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(enable_prefix_caching=True), "prefix caching"),
        (dict(pipeline_parallel_size=2), "pipeline parallelism"),
        (dict(kv_cache_dtype="fp8"), "KV cache of fp8"),
        (dict(enable_lora=True), "LoRA"),
        (dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}), "speculative decoding"),
        (dict(worker_cls="my.Worker"), "--worker-cls"),
        (dict(enable_prompt_embeds=True), "embeddings"),
    ],
)
def test_what_is_not_served_is_refused_by_name(arguments, message):
    with pytest.raises(ServingError, match=message):
        routed(**arguments)


class Changed:
    """Stands for a configuration in which some values are others, those of its parts by `__`."""

    def __init__(self, own, **values):
        self._own, self._values, self._parts = own, {}, {}
        for name, value in values.items():
            part, _, rest = name.partition("__")
            if rest:
                self._parts.setdefault(part, {})[rest] = value
            else:
                self._values[name] = value

    def __getattr__(self, name):
        if name in self._values:
            return self._values[name]
        found = getattr(self._own, name)
        return Changed(found, **self._parts[name]) if name in self._parts else found


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(parallel_config__decode_context_parallel_size=2), "context parallelism"),
        (dict(parallel_config__data_parallel_size=2, model_config__is_moe=True), "mixtures of experts"),
        (dict(parallel_config__enable_dbo=True), "DBO"),
        (dict(scheduler_config__disable_hybrid_kv_cache_manager=True), "one KV cache group"),
        (dict(compilation_config__pass_config__enable_sp=True), "sequence parallelism"),
        (dict(kv_transfer_config=object()), "KV connectors"),
        (dict(model_config__use_mla=True), "MLA"),
        (dict(model_config__is_encoder_decoder=True), "encoder-decoder"),
        (dict(model_config__is_multimodal_model=True), "images"),
        (dict(model_config__is_hybrid=True), "state-space"),
        (dict(model_config__runner_type="pooling"), "generate nothing"),
    ],
)
def test_what_takes_other_models_or_cards_to_ask_for_is_refused_too(values, message):
    made = routed()
    assert plugin.refusals(made) == []
    (found,) = plugin.refusals(Changed(made, **values))
    assert message in found


class Layer:
    """Stands for a layer's attention in vLLM."""

    def __init__(self, impl, sliding_window=None, **values):
        self.impl, self.sliding_window = impl, sliding_window
        self.head_size, self.dtype, self.num_heads, self.num_kv_heads = 64, torch.float32, 4, 2
        vars(self).update(values)


class Plain(RoutedAttention):
    """Stands for routed attention of plain causal softmax."""

    def __init__(self, **values):
        vars(self).update(values)

    def takes(self, head_size, dtype):
        return head_size == 64


@pytest.mark.parametrize(
    "layer, message",
    [
        (Layer(Plain(), sliding_window=128), "has a sliding window"),
        (Layer(object()), "attends by object, but on GPUs FlashAttention"),
        (Layer(Plain(), head_size=80), "heads of 80"),
        (Layer(Plain(logits_soft_cap=50.0)), "has logits_soft_cap"),
        (Layer(Plain(sinks=torch.zeros(4))), "has sinks"),
        (Layer(Plain(alibi_slopes=[0.5])), "has alibi_slopes"),
        (Layer(Plain(kv_sharing_target_layer_name="model.layers.0")), "has kv_sharing_target_layer_name"),
        (Layer(Plain(), num_kv_heads=1), "differ in heads"),
        (None, "no layer that attends over the whole context"),
    ],
)
def test_layers_that_are_not_plain_attention_are_refused_by_name(layer, message, monkeypatch):
    plain = Layer(Plain(logits_soft_cap=0, sinks=None))
    layers = {"model.layers.0.attn": plain}
    monkeypatch.setattr(model, "get_layers_from_vllm_config", lambda config, kind: layers)
    assert model.routed_attentions(None) == {0: plain}
    layers |= {"model.layers.1.attn": layer}
    if layer is None:
        layers.clear()
    with pytest.raises(ServingError, match=message):
        model.routed_attentions(None)


def test_adapters_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(AdapterError, match="nowhere"):
        routed(routers=tmp_path / "nowhere")
    with pytest.raises(FluxConfigError, match="not trained with one"):
        routed(budget=0.5)
    _, own = adapters.load_config(ROUTERS)
    changed = FluxConfig.from_dict({**own.to_dict(), "sparse": FluxConfig(pattern="triangle").sparse})
    (tmp_path / "flux_config.json").write_text(__import__("json").dumps(changed.to_dict()))
    (tmp_path / "routers.safetensors").write_bytes((ROUTERS / "routers.safetensors").read_bytes())
    with pytest.raises(ServingError, match="triangle"):
        routed(routers=tmp_path)


@pytest.mark.parametrize("version", ["0.24.0", "0.33.0", "1.0"])
def test_untested_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ServingError, match=f"vLLM {version} was not tested"):
        routed()


def test_vllm_finds_the_routed_backend_by_its_name():
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from flux_attention.serving.backend import RoutedBackend

    assert resolve_obj_by_qualname(".".join(RoutedBackend.full_cls_name())) is RoutedBackend
