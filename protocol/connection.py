"""An MQTT connection driven by the running asyncio loop.

paho's own loop uses `select` and a thread for each client, and stops working at about 340 clients in a process; here
every client's socket is watched by the one loop, which also runs its callbacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from frostline.protocol.errors import BrokerUnreachable, UsageError

KEEPALIVE_SECONDS = 30
KEEPALIVE_CHECK_SECONDS = 5.0
"""How late a ping may be; a broker waits for half a keepalive longer than one, and a thousand clients share a core."""
CONNECT_TIMEOUT_SECONDS = 10.0
RECONNECT_SECONDS = (1.0, 60.0)


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker is and how to enter.

    Attributes
    ----------
    others : tuple of (str, int)
        Hosts and ports of the cluster's other nodes, where there is one.
    tls : bool
        Encrypt, and check the broker's certificate.
    ca_file, certificate_file, key_file : Path or None
        Authority to trust in place of the system's, and the device's own certificate and key.
    """

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    others: tuple[tuple[str, int], ...] = ()

    @property
    def nodes(self) -> list[tuple[str, int]]:
        """Host and port of every node, in the order they are tried."""
        return [(self.host, self.port), *self.others]

    @classmethod
    def parse(
        cls,
        url: str,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
    ) -> BrokerAddress:
        """Parse `mqtt://[user:password@]host[:1883]` or `mqtts://host[:8883]`; a cluster's nodes stand with commas between.

        Raises
        ------
        UsageError
            If the URL has another form or a certificate file does not exist.
        """
        example = "use mqtt://host:1883, or mqtts://host:8883 for TLS"
        try:
            parts = urlsplit(url)
            entry, _, hosts = parts.netloc.rpartition("@")
            nodes = [urlsplit(f"//{host}") for host in hosts.split(",")]
            default = 8883 if parts.scheme == "mqtts" else 1883
            found = [(node.hostname or "", node.port or default) for node in nodes]
        except ValueError:
            raise UsageError(f"broker {url!r}: the port is not a number; {example}") from None
        complete = all(host for host, _ in found) and parts.path in ("", "/")
        if parts.scheme not in ("mqtt", "mqtts") or not complete:
            raise UsageError(f"broker {url!r}: not a broker's URL; {example}")
        for file in (ca_file, certificate_file, key_file):
            if file is not None and not file.is_file():
                raise UsageError(f"{file}: no such certificate or key file")
        username, _, password = entry.partition(":")
        return cls(
            *found[0],
            parts.scheme == "mqtts",
            unquote(username) or None,
            unquote(password) or None,
            ca_file,
            certificate_file,
            key_file,
            tuple(found[1:]),
        )

    def __str__(self) -> str:
        nodes = ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"mqtt{'s' if self.tls else ''}://{nodes}"


@dataclass(frozen=True)
class Will:
    """A retained message the broker publishes when this client vanishes."""

    topic: str
    payload: bytes


class Connection:
    """A client that reconnects by itself and subscribes again when it does.

    Of a cluster's nodes it takes the first that answers, and the next one whenever it loses that.

    Nothing depends on a session kept by the broker: every connection is clean, and `on_connected` is where the owner
    publishes what the broker may have forgotten.

    Parameters
    ----------
    address : BrokerAddress
        The broker.
    client_id : str
        Unique among the broker's clients: a second client of the same id disconnects the first.
    will : Will or None
        Published by the broker if this client vanishes.
    """

    def __init__(self, address: BrokerAddress, client_id: str, will: Will | None = None) -> None:
        self._address = address
        self._node = 0
        self._client = _client(address, client_id, will)
        self._subscriptions: dict[str, int] = {}
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._settled = asyncio.Event()
        self._refusal = ""
        self._unacknowledged: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self.on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self.on_connected: Callable[[], None] = lambda: None
        self._attach()

    @property
    def connected(self) -> bool:
        """Whether the broker is there right now."""
        return self._connected.is_set()

    async def open(self, *, patient: bool = False) -> None:
        """Connect, and keep connected until `close`.

        Parameters
        ----------
        patient : bool
            Go on trying where no node answers the first time, as after any later loss.

        Raises
        ------
        BrokerUnreachable
            If no node answers the first time, unless patient.
        """
        for last in reversed(range(len(self._address.nodes))):
            try:
                await self._connect()
                break
            except BrokerUnreachable:
                if not last and not patient:
                    raise
                self._node += 1
        if not self.connected:
            self._lost.set()
        self._tasks = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._reconnect())]

    async def close(self) -> None:
        """Say goodbye to the broker, after it has acknowledged what was published, within two seconds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        deadline = self._loop.time() + 2
        # An acknowledgement that finds the socket closed resets it, and what the broker has not read yet is lost.
        while self.connected and self._unacknowledged and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        self._client.disconnect()
        # The farewell is the last packet to be written; unwritten, the broker would publish the will.
        while self.connected and self._client.want_write() and self._loop.time() < deadline:
            await asyncio.sleep(0.01)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Hand a message to the broker; while disconnected it is dropped, and the protocol's own retries mend it."""
        if self.connected:
            message = self._client.publish(topic, payload, qos, retain)
            if qos > 0:
                self._unacknowledged.add(message.mid)

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Receive `topic`, also after a reconnect."""
        self._subscriptions[topic] = qos
        if self.connected:
            self._client.subscribe(topic, qos)

    def unsubscribe(self, topic: str) -> None:
        """Stop receiving `topic`."""
        if self._subscriptions.pop(topic, None) is not None and self.connected:
            self._client.unsubscribe(topic)

    async def _connect(self) -> None:
        self._lost.clear()
        self._settled.clear()
        self._refusal = ""
        host, port = self._address.nodes[self._node % len(self._address.nodes)]
        try:
            # Name resolution and the TCP and TLS handshakes block; the loop must not.
            await asyncio.to_thread(self._client.connect, host, port, keepalive=KEEPALIVE_SECONDS)
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self._settled.wait()
            if not self.connected:
                raise ConnectionError("the connection was closed")
        except (OSError, ssl.SSLError, TimeoutError, UnicodeError) as error:
            # A UnicodeError comes from host names that DNS cannot express.
            reason = self._refusal or _plain(error)
            self._abandon_socket()
            raise BrokerUnreachable(
                f"broker {self._address}: {reason}; check that it runs and that host, port and TLS fit"
            ) from None

    def _abandon_socket(self) -> None:
        """End a half-open connection, so that paho closes its socket in the loop and not under it."""
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            self._forget(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            self._client.loop_read()

    async def _reconnect(self) -> None:
        shortest, longest = RECONNECT_SECONDS
        delay = shortest
        while True:
            await self._lost.wait()
            # Full jitter, so that a fleet does not return to a restarted broker, or to the next node, all at once.
            await asyncio.sleep(random.uniform(0, delay))
            self._node += 1
            with contextlib.suppress(BrokerUnreachable):
                await self._connect()
            # Every node has its turn before the pause grows.
            tried_all = self._node % len(self._address.nodes) == 0
            delay = shortest if self.connected else min(delay * 2, longest) if tried_all else delay
            if not self.connected:
                self._lost.set()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_CHECK_SECONDS)
            self._client.loop_misc()

    def _attach(self) -> None:
        def later(function: Callable[..., Any]) -> Callable[..., None]:
            # `connect` runs in a thread, so its socket callbacks hop back to the loop.
            return lambda _client, _userdata, sock: self._call(function, sock)

        self._client.on_socket_open = later(self._watch)
        self._client.on_socket_close = later(self._forget)
        self._client.on_socket_register_write = later(self._watch_writes)
        self._client.on_socket_unregister_write = later(self._forget_writes)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.on_message = lambda _client, _userdata, m: self._guard(
            lambda: self.on_message(m.topic, bytes(m.payload))
        )

    def _guard(self, function: Callable[[], None]) -> None:
        # paho handles a packet again, and again, until its callback returns.
        try:
            function()
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": "an MQTT message was not handled", "exception": error}
            )

    def _call(self, function: Callable[[Any], None], sock: Any) -> None:
        try:
            running = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            running = False
        if running:
            function(sock)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, sock)

    def _watch(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A phone that changed networks finds out when nobody acknowledges; without this, after a quarter of an hour.
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    milliseconds = 1000 * KEEPALIVE_SECONDS
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            self._loop.add_reader(sock, self._read)

    def _read(self) -> None:
        self._client.loop_read()
        # TLS may hold decrypted packets that the socket no longer announces.
        sock = self._client.socket()
        while isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._client.loop_read()
            sock = self._client.socket()

    def _forget(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _watch_writes(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.add_writer(sock, self._client.loop_write)

    def _forget_writes(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock)

    def _on_connect(
        self, _client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.is_failure:
            self._refusal = f"refused the connection ({reason})"
            return
        self._connected.set()
        self._settled.set()
        for topic, qos in self._subscriptions.items():
            self._client.subscribe(topic, qos)
        self._guard(self.on_connected)

    def _on_disconnect(
        self, _client: Any, _userdata: Any, _flags: Any, _reason: ReasonCode, _properties: Any
    ) -> None:
        self._connected.clear()
        self._settled.set()
        self._lost.set()

    def _on_publish(
        self, _client: Any, _userdata: Any, mid: int, _reason: ReasonCode, _properties: Any
    ) -> None:
        self._unacknowledged.discard(mid)


def _client(address: BrokerAddress, client_id: str, will: Will | None) -> mqtt.Client:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=True)
    client.connect_timeout = CONNECT_TIMEOUT_SECONDS
    client.max_inflight_messages_set(64)
    if address.username is not None:
        client.username_pw_set(address.username, address.password)
    if address.tls:
        _set_tls(client, address)
    if will is not None:
        client.will_set(will.topic, will.payload, qos=1, retain=True)
    return client


def _set_tls(client: mqtt.Client, address: BrokerAddress) -> None:
    files = (address.ca_file, address.certificate_file, address.key_file)
    ca_file, certificate_file, key_file = (str(file) if file else None for file in files)
    if key_file and not certificate_file:
        raise UsageError(f"{key_file}: a key needs its certificate file beside it")
    try:
        client.tls_set(ca_certs=ca_file, certfile=certificate_file, keyfile=key_file)
    except (ssl.SSLError, OSError) as error:
        named = ", ".join(str(file) for file in files if file)
        raise UsageError(f"{named}: not usable as PEM certificates and keys: {error}") from None


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_SECONDS:.0f} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
