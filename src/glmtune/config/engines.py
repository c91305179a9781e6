"""The settings of what works on rows: this process, Ray over many, or vLLM for answers."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from glmtune.config.groups import NameText, Settings, conflict

_ADDRESS = (
    "address of a Ray cluster, HOST:PORT (default: the environment's RAY_ADDRESS, else a Ray is "
    "started on this machine for the command)"
)
_SPREAD = (
    "what works on the rows: this process, or Ray Data on all cores and machines that it has, with "
    "the same result"
)
_NOT_OF_VLLM = (
    "num_beams", "decode_bits", "decode_compile", "quantization_bit", "quantize_head", "use_cpu",
)  # fmt: skip
_TEMPERATURES_OF_VLLM = 0.01, 2.0
"""Lower ones it raises to that, higher ones it refuses."""


class EngineSettings(Settings):
    """Which engine answers rows."""

    group: ClassVar[str] = "engine"
    engine: Literal["local", "ray", "vllm"] = Field(
        "local",
        description=f"{_SPREAD}; or vLLM, with the same prompts and stops, for the families that "
        "it serves",
    )
    ray_address: NameText | None = Field(None, description=_ADDRESS)

    @model_validator(mode="after")
    def address_of_ray(self) -> Self:
        """Refuse an address that nothing would use."""
        if self.ray_address and self.engine != "ray":
            raise conflict(
                f"ray_address {self.ray_address} has no effect with engine {self.engine}: set "
                "engine ray, or leave it out",
                "ray_address",
                "engine",
            )
        return self

    @model_validator(mode="after")
    def settings_of_vllm(self) -> Self:
        """Refuse what vLLM does not do, or not as this process does."""
        if self.engine != "vllm":
            return self
        for name in _NOT_OF_VLLM:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise conflict(
                    f"{name} {value} has no effect with engine vllm: leave it out, or set engine "
                    "local",
                    name,
                    "engine",
                )
        low, high = _TEMPERATURES_OF_VLLM
        temperature = getattr(self, "temperature", None)
        if temperature and not low <= temperature <= high:
            raise conflict(
                f"temperature {temperature} is none that engine vllm takes, from {low} to {high} "
                "or 0: choose such a one, or set engine local",
                "temperature",
                "engine",
            )
        return self

    def own_answers(self) -> dict[str, Any]:
        """The engine, where its answers are not those of this process to the bit."""
        return {"engine": "vllm"} if self.engine == "vllm" else {}


class SpreadSettings(EngineSettings):
    """Which engine works on rows without answering them."""

    group: ClassVar[str] = "engine"
    engine: Literal["local", "ray"] = Field("local", description=_SPREAD)
