"""What the plugin makes of an engine's arguments, before anything is started."""

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from flux_attention import FluxConfig, adapters
from flux_attention.errors import AdapterError, FluxConfigError, ServingError
from flux_attention.names import BACKBONE, ROUTERS
from flux_attention.serving import plugin
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
