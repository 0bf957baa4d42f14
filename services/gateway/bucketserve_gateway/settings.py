"""Settings of the gateway: [gateway] in the file, BUCKETSERVE_GATEWAY_* in the environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from bucketserve.addresses import Address, AddressError
from bucketserve.config import AddressList, ListenAddress, NamedTexts, OptionalListen, OptionalTarget, Section, optional
from bucketserve.store.url import check_store_url

__all__ = ["GatewaySettings"]


class GatewaySettings(Section):
    """[gateway]."""

    listen: ListenAddress = Field("127.0.0.1:50051", description="host:port of the public API and health checks")
    http_listen: OptionalListen = Field("127.0.0.1:8000", description="host:port of OpenAI's HTTP API; empty: off")
    delivery_listen: ListenAddress = Field("127.0.0.1:50053", description="host:port for tokens from workers")
    delivery_address: OptionalTarget = Field(
        "",
        validate_default=True,
        description="host:port at which workers reach delivery_listen of this very process; default: the same",
    )
    metrics_listen: OptionalListen = Field("127.0.0.1:9101", description="host:port for /metrics; empty: off")
    gateway_id: str = Field("", description="unique per process; default: host name and process id")
    scheduler_address: AddressList = Field(
        "127.0.0.1:50052", description="host:port of the scheduler; several, separated by commas, are tried in turn"
    )
    redis_url: Annotated[str, AfterValidator(optional(check_store_url))] = Field(
        "", repr=False, description="Redis or Valkey for JobService; empty: no batch jobs here"
    )
    job_concurrency: int = Field(64, ge=1, le=10_000, description="requests of batch jobs that run at once, from here")
    job_lease_s: float = Field(
        15.0, ge=1, le=600, description="a job's requests of a gateway that is gone run elsewhere after this, seconds"
    )
    max_job_requests: int = Field(100_000, ge=1, description="most requests in a job")
    max_job_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="most bytes of a job's requests, all together")
    max_tenant_job_bytes: int = Field(
        128 * 1024 * 1024, ge=1024, description="most bytes that jobs of a tenant may take in Redis, with their results"
    )
    max_all_job_bytes: int = Field(
        256 * 1024 * 1024, ge=1024, description="the same of all jobs: half of what Redis has, or less"
    )
    job_keys_file: str = Field(
        "",
        description="keys, 64 hexadecimal digits a line, that jobs, batches and files are sealed with in Redis: the "
        "first seals, any opens; empty: they are not sealed",
    )
    models: NamedTexts = Field(
        default_factory=dict,
        description="served models: name=directory or name=hf://organisation/name, comma-separated, or a JSON object",
    )
    aliases: NamedTexts = Field(
        default_factory=dict,
        description="further names of served models: alias=model, comma-separated, or a JSON object",
    )
    max_prompt_bytes: int = Field(4 * 1024 * 1024, ge=1, description="longest prompt in bytes, before tokenising")
    max_open_calls: int = Field(
        2_048, ge=2, le=100_000, description="calls open at once; a connection has at most as many as are still free"
    )
    max_streams_per_connection: int = Field(
        1_000, ge=1, le=100_000, description="calls open at once on a connection; further ones are refused"
    )
    max_infer_streams: int = Field(
        16,
        ge=2,
        le=100_000,
        description="ModelStreamInfer calls open at once, each with up to 64 requests; a connection has at most as "
        "many as are still free. Each may hold two of the largest messages, of 12 MB or more",
    )
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="most bytes of prompts that open requests hold, as text and as tokens, and of answers that are "
        "collected",
    )
    max_connections: int = Field(4_096, ge=1, le=1_000_000, description="clients' connections; further ones are closed")
    max_metadata_bytes: int = Field(16_384, ge=1024, le=1 << 20, description="most metadata of a call")
    default_max_tokens: int = Field(256, ge=1, description="max_tokens of a request that names none")
    max_attempts: int = Field(3, ge=1, le=20, description="starts of a request, with the first, when workers fail")
    output_queue_tokens: int = Field(16_384, ge=16, description="tokens kept for a client that does not read")
    scheduler_wait_s: float = Field(10.0, gt=0, description="how long a new request waits for an absent scheduler")
    share_prefixes: bool = Field(
        False,
        description="tenants share what workers know of prompts; where they do, how soon an answer comes tells one "
        "tenant what another has asked",
    )
    tokenizer_threads: int = Field(
        2, ge=1, le=64, description="threads that tokenise; long prompts have one of their own"
    )
    lame_duck_s: float = Field(
        1.0,
        ge=0,
        le=60,
        description="on SIGTERM, new requests are still taken for so long after health says NOT_SERVING, seconds",
    )
    drain_s: float = Field(25.0, ge=0, le=600, description="most time to finish on SIGTERM, seconds")
    keys_file: str = Field(
        "", description="TOML with the keys of clients, read again when it changes; empty: whoever can call may call"
    )
    jwks: str = Field(
        "",
        description="file or https URL with the public keys (JSON Web Key Set) of an identity provider, whose tokens "
        "are as good as keys; empty: none",
    )
    jwt_issuer: str = Field("", validate_default=True, description="iss of its tokens; needed with jwks")
    jwt_audience: str = Field(
        "", validate_default=True, description="aud of those that are for this deployment; needed with jwks"
    )
    jwt_tenant_claim: str = Field("tenant", min_length=1, description="claim that names the tenant")
    enable_reflection: bool | None = Field(
        None, description="answer gRPC reflection; default: unless there are keys_file or jwks"
    )

    @field_validator("jwks")
    @classmethod
    def _is_no_plain_url(cls, value: str) -> str:
        if "://" in value and not value.startswith("https://"):
            raise ValueError("name a file or an https:// URL: who could change the keys could be anybody")
        return value

    @field_validator("jwt_issuer", "jwt_audience")
    @classmethod
    def _are_named(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("jwks") and not value:
            raise ValueError("needed with jwks: any other token of the provider would do")
        return value

    @field_validator("delivery_address")
    @classmethod
    def _can_be_reached(cls, value: str, info: ValidationInfo) -> str:
        listen = info.data.get("delivery_listen", "")
        if not value and listen and Address.parse(listen).is_wildcard:
            raise AddressError(f"needed where delivery_listen is every address ({listen}); name one of this machine's")
        return value
