"""What a server is told about routing: by the environment, or by vLLM's ``--additional-config``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flux_attention import adapters
from flux_attention.config import DECIDE, FluxConfig, with_options
from flux_attention.errors import ServingError

#: The key of ``--additional-config``, and the environment variable that names an adapter.
KEY, VARIABLE = "flux_attention", "FLUX_ATTENTION_ROUTERS"


@dataclass(frozen=True)
class Settings:
    """
    Says how requests are routed.

    Attributes
    ----------
    routers : str
        Adapter: a directory, a Hub id, or ``shipped``.
    budget : float, optional
        Share of sparse layers, for adapters that take one; default: the adapter's own.
    decide : {"ends", "prefill"}
        When routers read a prompt: its two ends beforehand, or in each layer while the whole of it is computed.
    debug : bool
        Whether pages that are given back are filled with a large number, which shows in answers if one is read.
    """

    routers: str
    budget: float | None = None
    decide: str = "ends"
    debug: bool = False

    @classmethod
    def read(cls, additional: Mapping[str, Any] | None) -> Settings | None:
        """
        Read them from vLLM's additional configuration, or from the environment; None where no adapter is named.

        Raises
        ------
        ServingError
            For keys and values that mean nothing.
        """
        given = dict((additional or {}).get(KEY) or {})
        given.setdefault("routers", os.environ.get(VARIABLE) or None)
        if unknown := sorted(set(given) - {field.name for field in fields(cls)}):
            known = ", ".join(field.name for field in fields(cls))
            raise ServingError(f"--additional-config: {KEY} has unknown keys {unknown}, expected some of {known}")
        if given["routers"] is None:
            if len(given) > 1:
                raise ServingError(f"--additional-config: {KEY} names no adapter; expected routers, or {VARIABLE}")
            return None
        budget, decide, debug = given.get("budget"), given.get("decide", "ends"), given.get("debug", False)
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float)):
            raise ServingError(f"--additional-config: budget is {budget!r}, expected a number between 0 and 1")
        if decide not in DECIDE:
            raise ServingError(f"--additional-config: decide is {decide!r}, expected one of {DECIDE}")
        if not isinstance(debug, bool):
            raise ServingError(f"--additional-config: debug is {debug!r}, expected true or false")
        return cls(str(given["routers"]), None if budget is None else float(budget), decide, debug)

    def to_dict(self) -> dict[str, Any]:
        """Return them as vLLM's additional configuration holds them."""
        return {KEY: asdict(self)}

    def config(self) -> FluxConfig:
        """
        Read the adapter's configuration, as it is served.

        Raises
        ------
        AdapterError, FluxConfigError, ServingError
            If it cannot be read, or cannot be served.
        """
        _, config = adapters.load_config(self.routers)
        return self.served(config)

    def served(self, config: FluxConfig) -> FluxConfig:
        """Put these settings in place of what an adapter says; raises as ``config``."""
        if config.granularity == "head":
            raise ServingError(f"the routers of {self.routers} decide by head, which saves nothing; expected by layer")
        for what, settings, known in (
            ("sparse", config.sparse, ("streaming",)), ("full", config.full, ("full", "block_sparse")),
        ):  # fmt: skip
            if settings["pattern"] not in known:
                raise ServingError(
                    f"the {what} layers of {self.routers} compute {settings['pattern']}, which vLLM has no kernel for "
                    f"here; expected {' or '.join(known)}"
                )
        given = config.full.get("threshold")
        thresholds = given.values() if isinstance(given, Mapping) else [given]
        if config.full.get("correct") or any(isinstance(some, list | tuple) for some in thresholds):
            raise ServingError(
                f"the full layers of {self.routers} are block-sparse with a correction or with thresholds by head, "
                "which vLLM has no kernel for here; expected one threshold a layer and correct: false"
            )
        if (block := config.sparse.get("block_size", 1)) != 1:
            raise ServingError(
                f"the sparse layers of {self.routers} round to blocks of {block} tokens, which vLLM has no kernel for "
                "here; leave block_size out of its flux_config.json for exact tokens (`flux-attention import --exact`)"
            )
        return with_options(config, self.budget, self.decide if config.ranking is None else None)
