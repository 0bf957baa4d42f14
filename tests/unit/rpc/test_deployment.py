"""Who is let in by a service of a deployment."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import PeerRefusedError
from bucketserve.rpc.deployment import Deployment

OURS = Deployment("blue", "s3cret")


def test_a_service_of_the_same_deployment_is_let_in() -> None:
    OURS.check((*Deployment("blue", "s3cret").metadata, ("other", "x"), ("binary-bin", b"\xff")))
    Deployment().check(Deployment().metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (),
        Deployment("green", "s3cret").metadata,
        Deployment("blue", "").metadata,
        Deployment("blue", "s3cre").metadata,
        Deployment("blue", "gehéim").metadata,
        (("bucketserve-deployment", b"blue"), ("bucketserve-token", b"s3cret")),
    ],
)
def test_others_are_refused_and_nothing_says_the_token(metadata) -> None:
    with pytest.raises(PeerRefusedError) as caught:
        OURS.check(metadata)
    assert "s3cret" not in str(caught.value) + repr(OURS)
