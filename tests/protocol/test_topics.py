from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.protocol.errors import ProtocolViolation, UsageError
from frostline.protocol.topics import HASH_DIGITS, NAME, Received, Topics, checked_name

NAMES = st.from_regex(NAME, fullmatch=True)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
UPDATES = st.binary(min_size=16, max_size=16).map(bytes.hex)

BAD_NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "../a",
    "/etc",
    "a\\b",
    "a b",
    "A",
    "é",
    "a\n",
    "a\0",
    "+",
    "#",
    "$sys",
    "-a",
    "a-",
    "a" * 65,
    "٣",
]
"""Names that would leave a folder, match other topics or differ between file systems."""


@given(name=NAMES)
def test_allowed_names_are_returned_unchanged(name: str) -> None:
    assert checked_name(name, "device name") == name
    assert len(name) <= 64
    assert not set(name) & set("/.+#\\")


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a--b", "a" * 64])
def test_names_at_the_edges_are_allowed(name: str) -> None:
    assert checked_name(name, "device name") == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_by_what_and_name(name: str) -> None:
    with pytest.raises(UsageError, match="device name") as raised:
        checked_name(name, "device name")
    assert repr(name) in str(raised.value)
    with pytest.raises(UsageError, match="fleet name"):
        Topics(name)


@given(fleet=NAMES, device=NAMES, kind=st.sampled_from(["presence", "answer", "request", "offer"]))
def test_parse_inverts_the_builders(fleet: str, device: str, kind: str) -> None:
    topics = Topics(fleet)
    assert topics.parse(getattr(topics, kind)(device)) == Received(device, kind)


@given(fleet=NAMES, device=NAMES, update=UPDATES, index=st.integers(0, 999_999))
def test_parse_inverts_update_chunk(fleet: str, device: str, update: str, index: int) -> None:
    topics = Topics(fleet)
    assert topics.parse(topics.update_chunk(device, update, index)) == Received(
        device, "chunk", update, index
    )


@given(fleet=NAMES, device=NAMES, sha256=HASHES, update=UPDATES)
def test_all_topics_suit_every_broker(fleet: str, device: str, sha256: str, update: str) -> None:
    topics = Topics(fleet)
    downward = [topics.run, topics.index(sha256), topics.chunk(sha256)]
    downward += [topics.lease(device), topics.receipt(device)]
    upward = [topics.presence(device), topics.answer(device), topics.request(device), topics.offer(device)]
    upward += [topics.update_chunk(device, update, 999_999)]
    for topic in [*downward, *upward]:
        assert topic.count("/") <= 7
        assert set(topic) <= set("abcdefghijklmnopqrstuvwxyz0123456789/-")
    assert len({*downward, *upward}) == len(downward) + len(upward)
    for topic in downward:
        with pytest.raises(ProtocolViolation):
            topics.parse(topic)


@given(sha256=HASHES)
def test_content_topics_end_in_the_first_digits_of_the_hash(sha256: str) -> None:
    topics = Topics("f")
    assert topics.index(sha256).rsplit("/", 1)[1] == sha256[:HASH_DIGITS]
    assert topics.chunk(sha256).rsplit("/", 1)[1] == sha256[:HASH_DIGITS]


@given(topic=st.text(max_size=300))
def test_text_outside_the_fleet_is_only_ever_a_violation(topic: str) -> None:
    with pytest.raises(ProtocolViolation):
        Topics("f").parse(topic)


@given(
    levels=st.lists(
        st.sampled_from(["", "a", "..", "presence", "chunk", "offer", "0", "b" * 32, "x"]), max_size=6
    )
)
def test_what_parses_is_rebuilt_exactly(levels: list[str]) -> None:
    topics = Topics("f")
    topic = "/".join([f"{topics.root}/from", *levels])
    try:
        received = topics.parse(topic)
    except ProtocolViolation as error:
        assert repr(topic[:200]) in str(error)
        return
    if received.kind == "chunk":
        assert topics.update_chunk(received.device, received.update, received.index) == topic
    else:
        assert getattr(topics, received.kind)(received.device) == topic


@pytest.mark.parametrize(
    "below",
    [
        "presence",
        "d",
        "d/",
        "d/lease",
        "d/presence/",
        "d/presence/x",
        "/presence",
        "../presence",
        "D/presence",
        "d/chunk",
        f"d/chunk/{'b' * 32}",
        f"d/chunk/{'b' * 31}/0",
        f"d/chunk/{'B' * 32}/0",
        f"d/chunk/{'b' * 32}/",
        f"d/chunk/{'b' * 32}/-1",
        f"d/chunk/{'b' * 32}/01",
        f"d/chunk/{'b' * 32}/1000000",
        f"d/chunk/{'b' * 32}/٣",
        f"d/chunk/{'b' * 32}/0\n",
        f"d/chunk/{'b' * 32}/0/0",
    ],
)
def test_topics_no_device_may_write_are_violations(below: str) -> None:
    topics = Topics("f")
    with pytest.raises(ProtocolViolation, match="unexpected topic"):
        topics.parse(f"{topics.root}/from/{below}")


def test_another_fleet_is_a_violation_even_if_its_name_begins_alike() -> None:
    with pytest.raises(ProtocolViolation):
        Topics("f").parse(Topics("f-2").presence("d"))


def test_a_long_topic_is_shortened_in_the_error() -> None:
    with pytest.raises(ProtocolViolation) as raised:
        Topics("f").parse("x" * 60_000)
    assert len(str(raised.value)) < 300


def test_the_server_subscribes_to_every_topic_it_parses_and_no_other() -> None:
    topics = Topics("f")
    written = [topics.presence("d"), topics.answer("d"), topics.request("d"), topics.offer("d")]
    written.append(topics.update_chunk("d", "b" * 32, 7))

    def matches(pattern: str, topic: str) -> bool:
        levels, parts = pattern.split("/"), topic.split("/")
        return len(levels) == len(parts) and all(a in ("+", b) for a, b in zip(levels, parts, strict=True))

    for topic in written:
        assert sum(matches(pattern, topic) for pattern in topics.server_filters) == 1
    for topic in [topics.run, topics.lease("d"), topics.receipt("d"), Topics("g").offer("d")]:
        assert not any(matches(pattern, topic) for pattern in topics.server_filters)
