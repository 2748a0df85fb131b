"""How a cluster is described on the command line."""

import pytest

from hf_clm.doctor.cluster import Cluster, parse_cluster
from hf_clm.errors import RecipeError


def test_two_keys_are_enough_and_the_rest_is_that_of_an_h100():
    assert parse_cluster("gpus=64,memory=80GB") == Cluster(gpus=64, memory=80e9, node=8)
    found = parse_cluster("gpus=64,memory=80GB")
    assert (found.bandwidth, found.network, found.flops, found.mfu, found.boxes) == (
        450e9,
        50e9,
        989e12,
        0.4,
        8,
    )


def test_fewer_than_eight_gpus_are_one_box():
    assert (parse_cluster("gpus=2,memory=24GB").node, parse_cluster("gpus=2,memory=24GB").boxes) == (2, 1)


def test_every_key_can_be_given_with_its_unit():
    text = "gpus=16, memory=40GiB, node=4, bandwidth=300GB, network=12.5GB, host=25e9, flops=312T"
    text += ", mfu=0.5, length=2K"

    assert parse_cluster(text) == Cluster(
        gpus=16,
        memory=40 * 2**30,
        node=4,
        bandwidth=300e9,
        network=12.5e9,
        host=25e9,
        flops=312e12,
        mfu=0.5,
        length=2000,
    )


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("80GB", 80e9), ("80gb", 80e9), ("80g", 80e9), ("8e10", 80e9), ("40gib", 40 * 2**30), ("1TB", 1e12)],
)
def test_a_unit_may_be_written_small(text, bytes_):
    assert parse_cluster(f"gpus=8,memory={text}").memory == bytes_


def test_one_gpu_is_singular():
    assert (Cluster(gpus=1, memory=80e9).counted, Cluster(gpus=8, memory=80e9).counted) == ("1 GPU", "8 GPUs")


def test_a_row_has_4096_tokens_where_nobody_says_more():
    found = parse_cluster("gpus=8,memory=80GB")

    assert (found.length, found.row) == (None, 4096)
    assert parse_cluster("gpus=8,memory=80GB,length=8192").row == 8192


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64,memory=80GB", "--plan: expected key=value; got '64'; fix: as in gpus=64,memory=80GB"),
        ("gpus=64", "--plan: memory is missing; got 'gpus=64'; fix: as in gpus=64,memory=80GB"),
        ("gpus=8,gpus=9,memory=80GB", "--plan: a key is given twice; got 'gpus'"),
        (
            "gpus=8,memori=80GB",
            "--plan: no such key; got 'memori'; fix: one of gpus, memory, node, bandwidth, network, host, "
            "flops, mfu, length; did you mean 'memory'?",
        ),
        (
            "gpus=many,memory=80GB",
            "--plan: gpus: expected a whole number over 0; got 'many'; fix: as in gpus=64",
        ),
        ("gpus=0,memory=80GB", "--plan: gpus: expected a whole number over 0; got '0'; fix: as in gpus=64"),
        (
            "gpus=1.5,memory=80GB",
            "--plan: gpus: expected a whole number over 0; got '1.5'; fix: as in gpus=64",
        ),
        (
            "gpus=1e400,memory=80GB",
            "--plan: gpus: expected a whole number over 0; got '1e400'; fix: as in gpus=64",
        ),
        ("gpus=8,memory=big", "--plan: memory: expected a number over 0; got 'big'; fix: as in memory=80GB"),
        (
            "gpus=8,memory=8e400",
            "--plan: memory: expected a number over 0; got '8e400'; fix: as in memory=80GB",
        ),
        (
            "gpus=8,memory=80GB,flops=1e400",
            "--plan: flops: expected a number over 0; got '1e400'; fix: as in flops=989T",
        ),
        (
            "gpus=8,memory=80GB,network=400Gb",  # bits?
            "--plan: network: expected a number over 0; got '400Gb'; fix: as in network=50GB",
        ),
        (
            "gpus=8,memory=80GB,mfu=40%",
            "--plan: mfu: expected a number over 0; got '40%'; fix: as in mfu=0.4",
        ),
        (
            "gpus=8,memory=80",
            "--plan: memory is that of a GPU; got 80 bytes; fix: with its unit: memory=80GB",
        ),
        ("gpus=12,memory=80GB", "--plan: 12 GPUs cannot fill boxes of 8; fix: node=GPUs of a box"),
        ("gpus=8,memory=80GB,mfu=40", "--plan: mfu is a share; got 40; fix: 0.4, or what bench says"),
    ],
)
def test_a_description_that_cannot_be_read_says_what_is_wrong(text, expected):
    with pytest.raises(RecipeError) as raised:
        parse_cluster(text)

    assert str(raised.value) == expected
