from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from frostline.emulator.broker import EmbeddedBroker, find_mosquitto
from frostline.protocol import connection as connection_module
from frostline.protocol.connection import BrokerAddress, Connection, Will
from frostline.protocol.errors import BrokerUnreachable, UsageError

PATIENCE_SECONDS = 15.0
Received = tuple[str, bytes]


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerAddress]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with EmbeddedBroker(kind="mosquitto") as running:
        yield BrokerAddress.parse(running.url)


class Inbox:
    """What a connection received."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Received] = asyncio.Queue()

    def put(self, topic: str, payload: bytes) -> None:
        self._messages.put_nowait((topic, payload))

    async def get(self) -> Received:
        return await asyncio.wait_for(self._messages.get(), PATIENCE_SECONDS)

    async def rest(self) -> list[Received]:
        """All that comes within a moment."""
        await asyncio.sleep(0.3)
        return [self._messages.get_nowait() for _ in range(self._messages.qsize())]


@asynccontextmanager
async def opened(
    address: BrokerAddress, client_id: str, will: Will | None = None
) -> AsyncIterator[tuple[Connection, Inbox]]:
    connection, inbox = Connection(address, client_id, will), Inbox()
    connection.on_message = inbox.put
    await connection.open()
    try:
        yield connection, inbox
    finally:
        await connection.close()


async def subscribed(connection: Connection, inbox: Inbox, topic: str) -> None:
    """Subscribe, and wait until the broker has done so."""
    connection.subscribe(topic)
    connection.subscribe("probe")
    connection.publish("probe", b"")
    assert await inbox.get() == ("probe", b"")
    connection.unsubscribe("probe")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(bounded())


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("payload", [b"", b"\x00\xff", bytes(1_000_000)], ids=["empty", "binary", "large"])
def test_what_is_published_is_received_unchanged(broker: BrokerAddress, payload: bytes, qos: int) -> None:
    async def main() -> None:
        async with opened(broker, "receiver") as (receiver, inbox), opened(broker, "sender") as (sender, _):
            await subscribed(receiver, inbox, "a/b")
            sender.publish("a/b", payload, qos=qos)
            sender.publish("a/c", b"not subscribed", qos=qos)
            assert await inbox.get() == ("a/b", payload)
            assert await inbox.rest() == []

    run(main())


def test_a_burst_arrives_whole_and_in_order(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "receiver") as (receiver, inbox), opened(broker, "sender") as (sender, _):
            await subscribed(receiver, inbox, "burst/+")
            sent = [(f"burst/{i}", os.urandom(1000)) for i in range(500)]
            for topic, payload in sent:
                sender.publish(topic, payload)
            assert [await inbox.get() for _ in sent] == sent

    run(main())


def test_unsubscribed_topics_are_no_longer_received(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "client") as (client, inbox):
            await subscribed(client, inbox, "a")
            client.unsubscribe("a")
            client.unsubscribe("never subscribed")
            await subscribed(client, inbox, "b")
            client.publish("a", b"1")
            client.publish("b", b"2")
            assert await inbox.get() == ("b", b"2")
            assert await inbox.rest() == []

    run(main())


def test_what_was_published_before_close_is_sent(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "receiver") as (receiver, inbox):
            await subscribed(receiver, inbox, "last")
            async with opened(broker, "sender") as (sender, _):
                for i in range(50):
                    sender.publish("last", bytes([i]) * 20_000)
            assert [(await inbox.get())[1][0] for _ in range(50)] == list(range(50))

    run(main())


def test_nothing_is_sent_before_open(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "receiver") as (receiver, inbox):
            await subscribed(receiver, inbox, "early")
            early = Connection(broker, "early")
            early.publish("early", b"dropped")
            early.subscribe("late")
            assert not early.connected
            early_inbox = Inbox()
            early.on_message = early_inbox.put
            await early.open()
            assert early.connected
            await subscribed(early, early_inbox, "other")
            receiver.publish("late", b"kept")
            assert await early_inbox.get() == ("late", b"kept")
            assert await inbox.rest() == []
            await early.close()

    run(main())


def test_an_error_in_a_handler_is_reported_once_and_the_connection_goes_on(
    broker: BrokerAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with opened(broker, "client") as (client, inbox):
            await subscribed(client, inbox, "a")
            calls: list[bytes] = []

            def handle(topic: str, payload: bytes) -> None:
                calls.append(payload)
                if payload == b"bad":
                    raise ValueError("cannot handle this")

            client.on_message = handle
            client.publish("a", b"bad")
            client.publish("a", b"good")
            await until(lambda: b"good" in calls)
            assert calls == [b"bad", b"good"]
            assert client.connected

    with caplog.at_level(logging.ERROR):
        run(main())
    assert caplog.text.count("ValueError: cannot handle this") == 1


def test_an_error_in_on_connected_does_not_break_the_connection(
    broker: BrokerAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        client, inbox = Connection(broker, "client"), Inbox()
        client.on_message = inbox.put

        def fail() -> None:
            raise ValueError("cannot connect to this")

        client.on_connected = fail
        await client.open()
        await subscribed(client, inbox, "a")
        await client.close()

    with caplog.at_level(logging.ERROR):
        run(main())
    assert caplog.text.count("ValueError: cannot connect to this") == 1


# -- Wills --


DOOMED = """
import asyncio, sys
from frostline.protocol.connection import BrokerAddress, Connection, Will

async def main():
    connection = Connection(BrokerAddress.parse(sys.argv[1]), "doomed", Will("wills/process", b"gone"))
    await connection.open()
    connection.publish("wills/process", b"alive", retain=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_will_is_delivered_when_the_process_is_killed(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "watcher") as (watcher, inbox):
            await subscribed(watcher, inbox, "wills/process")
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", DOOMED, str(broker))
            try:
                assert await inbox.get() == ("wills/process", b"alive")
            finally:
                process.kill()
                await process.wait()
            assert await inbox.get() == ("wills/process", b"gone")

    run(main())


def cut(connection: Connection) -> None:
    """Break the connection as a network failure would."""
    sock = connection._client.socket()
    assert isinstance(sock, socket.socket)
    sock.shutdown(socket.SHUT_RDWR)


def test_the_will_is_delivered_and_retained_when_the_socket_dies(
    broker: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RECONNECT_SECONDS", (60.0, 60.0))
    # Full jitter may draw a moment; here the client must stay away.
    monkeypatch.setattr("random.uniform", lambda low, high: high)

    async def main() -> None:
        async with (
            opened(broker, "watcher") as (watcher, inbox),
            opened(broker, "doomed", Will("wills/socket", b"gone")) as (doomed, _),
        ):
            await subscribed(watcher, inbox, "wills/socket")
            cut(doomed)
            assert await inbox.get() == ("wills/socket", b"gone")
            assert not doomed.connected
            async with opened(broker, "latecomer") as (latecomer, late_inbox):
                latecomer.subscribe("wills/socket")
                assert await late_inbox.get() == ("wills/socket", b"gone")

    run(main())


def test_the_will_is_not_delivered_after_close(broker: BrokerAddress) -> None:
    async def main() -> None:
        async with opened(broker, "watcher") as (watcher, inbox):
            await subscribed(watcher, inbox, "wills/closed")
            async with opened(broker, "polite", Will("wills/closed", b"gone")) as (polite, _):
                pass
            assert not polite.connected
            assert await inbox.rest() == []

    run(main())


# -- Reconnecting --


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "RECONNECT_SECONDS", (0.05, 0.2))


def test_a_cut_connection_comes_back_with_its_subscriptions(broker: BrokerAddress, quick: None) -> None:
    async def main() -> None:
        async with opened(broker, "client") as (client, inbox):
            returns: list[bool] = []
            client.on_connected = lambda: returns.append(client.connected)
            await subscribed(client, inbox, "kept")
            await subscribed(client, inbox, "dropped")
            client.unsubscribe("dropped")
            for times in (1, 2, 3):
                cut(client)
                while len(returns) < times:
                    await asyncio.sleep(0.02)
                client.publish("dropped", b"1")
                client.publish("kept", b"2")
                assert await inbox.get() == ("kept", b"2")
            assert await inbox.rest() == []
            assert returns == [True, True, True]

    run(main())


def test_clients_return_after_the_broker_restarts_on_the_same_port(quick: None) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with EmbeddedBroker(kind="mosquitto") as first:
        address = BrokerAddress.parse(first.url)

        async def main() -> None:
            async with (
                opened(address, "receiver") as (receiver, inbox),
                opened(address, "sender") as (sender, _),
            ):
                await subscribed(receiver, inbox, "news")
                sender.publish("news", b"before")
                assert await inbox.get() == ("news", b"before")
                await asyncio.to_thread(first.__exit__, None, None, None)
                await until(lambda: not receiver.connected and not sender.connected)
                # Long enough that reconnecting fails several times.
                await asyncio.sleep(0.5)
                assert not receiver.connected
                second = EmbeddedBroker(port=address.port, kind="mosquitto")
                # Entered here, on the main thread, as the broker asks; it takes a moment.
                with second:
                    await until(lambda: receiver.connected and sender.connected)
                    # Behind its own subscription on the same connection, so that the broker has made that.
                    receiver.publish("news", b"self")
                    assert await inbox.get() == ("news", b"self")
                    sender.publish("news", b"after")
                    assert await inbox.get() == ("news", b"after")

        run(main())


def test_the_next_node_is_taken_when_one_is_lost(quick: None) -> None:
    async def main() -> None:
        with socket.socket() as unused, EmbeddedBroker() as first, EmbeddedBroker() as second:
            unused.bind(("127.0.0.1", 0))
            ports = [BrokerAddress.parse(broker.url).port for broker in (first, second)]
            nodes = ",".join(f"127.0.0.1:{port}" for port in [unused.getsockname()[1], *ports])
            client = Connection(BrokerAddress.parse(f"mqtt://{nodes}"), "client")
            heard: list[bytes] = []
            client.on_message = lambda topic, payload: heard.append(payload)
            client.subscribe("topic")
            await client.open()
            os.kill(first.pid, signal.SIGKILL)
            other = Connection(BrokerAddress.parse(second.url), "other")
            await other.open()
            async with asyncio.timeout(30):
                while not heard:
                    other.publish("topic", b"moved")
                    await asyncio.sleep(0.05)
            await client.close()
            await other.close()

    asyncio.run(main())


def test_a_patient_client_waits_for_a_broker_that_comes_later(quick: None) -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        client = Connection(BrokerAddress("127.0.0.1", port), "client")
        await client.open(patient=True)
        assert not client.connected
        await asyncio.sleep(0.3)
        with EmbeddedBroker(port=port):
            await until(lambda: client.connected)
            await client.close()

    run(main())


def test_a_patient_client_can_leave_before_there_is_a_broker(quick: None) -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            client = Connection(BrokerAddress("127.0.0.1", unused.getsockname()[1]), "client")
            tasks = asyncio.all_tasks()
            await client.open(patient=True)
            await client.close()
            assert asyncio.all_tasks() == tasks

    run(main())


def test_closing_while_the_broker_is_away_ends_at_once(quick: None) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")

    async def main() -> None:
        tasks = asyncio.all_tasks()
        with EmbeddedBroker(kind="mosquitto") as running:
            client = Connection(BrokerAddress.parse(running.url), "client")
            await client.open()
        await until(lambda: not client.connected)
        started = time.monotonic()
        await client.close()
        assert time.monotonic() - started < 1
        assert asyncio.all_tasks() == tasks
        assert not client.connected

    run(main())


# -- Unreachable brokers --


async def expect_unreachable(address: BrokerAddress, within: float) -> str:
    connection = Connection(address, "client")
    started = time.monotonic()
    with pytest.raises(BrokerUnreachable) as raised:
        await connection.open()
    assert time.monotonic() - started < within
    assert not connection.connected
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"broker {address}: ")
    assert message.endswith("; check that it runs and that host, port and TLS fit")
    assert raised.value.__cause__ is None
    return message


def test_a_port_where_nobody_listens_is_unreachable_at_once() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]

        async def main() -> None:
            assert "connection refused" in await expect_unreachable(BrokerAddress("127.0.0.1", port), 1)

        run(main())


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 64, "a..b"])
def test_a_host_that_does_not_exist_is_unreachable(host: str) -> None:
    async def main() -> None:
        await expect_unreachable(BrokerAddress(host, 1883), 12)

    run(main())


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[BrokerAddress]:
    async def close_after(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(close_after, "127.0.0.1", 0)
    try:
        yield BrokerAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


def test_a_server_that_never_answers_is_unreachable_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert connection_module.CONNECT_TIMEOUT_SECONDS <= 10
    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT_SECONDS", 1.0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def main() -> None:
        async with serving(silent) as address:
            assert "no answer within 1 s" in await expect_unreachable(address, 3)

    run(main())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (bytes([0x20, 2, 0, 5]), "refused the connection (Not authorized)"),
        (bytes([0x20, 2, 0, 4]), "refused the connection (Bad user name or password)"),
        (b"", "the connection was closed"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the connection was closed"),
    ],
    ids=["not authorized", "bad password", "hung up", "not MQTT"],
)
def test_a_refusal_is_reported_at_once_with_its_reason(answer: bytes, reason: str) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await writer.drain()

    async def main() -> None:
        async with serving(refuse) as address:
            assert f": {reason};" in await expect_unreachable(address, 2)

    run(main())


def test_close_waits_for_the_acknowledgement_before_it_says_goodbye() -> None:
    goodbye = bytes([0xE0, 0])
    received: list[bytes] = []

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(bytes([0x20, 2, 0, 0]))
        received.append(await reader.read(1000))
        with contextlib.suppress(TimeoutError):
            received.append(await asyncio.wait_for(reader.read(1000), 0.3))
        writer.write(bytes([0x40, 2, 0, 1]))
        received.append(await reader.read(1000))

    async def main() -> None:
        async with serving(slow) as address:
            async with opened(address, "client") as (client, _):
                client.publish("t", b"payload")
            await asyncio.sleep(0.1)
        assert len(received) == 2
        assert received[0].endswith(b"payload")
        assert received[1] == goodbye

    run(main())


def test_tls_to_a_broker_without_it_is_unreachable(broker: BrokerAddress) -> None:
    async def main() -> None:
        await expect_unreachable(BrokerAddress(broker.host, broker.port, tls=True), 12)

    run(main())


# -- Addresses --


@pytest.mark.parametrize(
    ("url", "expected", "text"),
    [
        ("mqtt://host", BrokerAddress("host", 1883), "mqtt://host:1883"),
        (
            "mqtt://me@one,two:2,[::1]:3",
            BrokerAddress("one", 1883, username="me", others=(("two", 2), ("::1", 3))),
            "mqtt://one:1883,two:2,::1:3",
        ),
        ("mqtt://host/", BrokerAddress("host", 1883), "mqtt://host:1883"),
        ("mqtts://host", BrokerAddress("host", 8883, tls=True), "mqtts://host:8883"),
        ("mqtt://10.0.0.1:1234", BrokerAddress("10.0.0.1", 1234), "mqtt://10.0.0.1:1234"),
        ("MQTT://Host", BrokerAddress("host", 1883), "mqtt://host:1883"),
        ("mqtt://me@host", BrokerAddress("host", 1883, username="me"), "mqtt://host:1883"),
        (
            "mqtts://me:p%40ss%3A%2F@host:1",
            BrokerAddress("host", 1, tls=True, username="me", password="p@ss:/"),
            "mqtts://host:1",
        ),
    ],
)
def test_addresses_parse_and_print_without_the_password(url: str, expected: BrokerAddress, text: str) -> None:
    assert BrokerAddress.parse(url) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "host:1883",
        "http://host",
        "mqtt:host",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://host/topic",
        "mqtt://host:port",
        "mqtt://host:-1",
        "mqtt://host:65536",
        "mqtt://[::1",
    ],
)
def test_other_urls_are_usage_errors_with_an_example(url: str) -> None:
    with pytest.raises(UsageError, match="use mqtt://host:1883") as raised:
        BrokerAddress.parse(url)
    assert repr(url) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("option", ["ca_file", "certificate_file", "key_file"])
def test_certificate_files_must_exist(tmp_path: Path, option: str) -> None:
    file = tmp_path / "file.pem"
    with pytest.raises(UsageError, match="no such certificate or key file") as raised:
        BrokerAddress.parse("mqtts://host", **{option: file})
    assert str(file) in str(raised.value)
    file.write_text("pem")
    assert getattr(BrokerAddress.parse("mqtts://host", **{option: file}), option) == file
