"""An MQTT broker in memory that does with each message what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from paho.mqtt.client import topic_matches_sub

from frostline.protocol.connection import BrokerAddress, Will


@dataclass(frozen=True, eq=False)
class Held:
    """A message on its way to one client."""

    client: HeldClient
    topic: str
    payload: bytes


class HeldBroker:
    """Holds every message until it is delivered, in any order, repeatedly, damaged or never.

    Attributes
    ----------
    held : list of Held
        What is on its way, oldest first.
    published : callable
        Told of every message before it is on its way; False loses it before it reached the broker.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.held: list[Held] = []
        self.published: Callable[[HeldClient, str, bytes], bool] = lambda client, topic, payload: True
        self._retained: dict[str, bytes] = {}
        self._clients: list[HeldClient] = []

    def client(self, address: BrokerAddress, client_id: str, will: Will | None = None) -> HeldClient:
        """What stands in the place of a `Connection`."""
        return HeldClient(self, client_id, will)

    def deliver(self, message: Held, *, keep: bool = False, payload: bytes | None = None) -> None:
        """Bring a message to its client, or one with another payload in its place."""
        if not keep:
            self.held.remove(message)
        if message.client in self._clients:
            arriving = message if payload is None else replace(message, payload=payload)
            message.client.on_message(arriving.topic, arriving.payload)

    def restart(self) -> None:
        """Forget everything; whoever was connected connects again."""
        clients, self._clients = self._clients, []
        self.held.clear()
        self._retained.clear()
        for client in clients:
            self.welcome(client)

    def welcome(self, client: HeldClient) -> None:
        """Let a client in."""
        self._clients.append(client)
        for pattern in client.subscriptions:
            self.give_retained(client, pattern)
        client.on_connected()

    def part(self, client: HeldClient, *, with_will: bool = True) -> None:
        """Lose a client and what is on its way to it; its will is published unless it said goodbye."""
        if client in self._clients:
            self._clients.remove(client)
            self.held = [message for message in self.held if message.client is not client]
            if with_will and client.will is not None:
                self.take(client, client.will.topic, client.will.payload, retain=True)

    def take(self, client: HeldClient, topic: str, payload: bytes, *, retain: bool) -> None:
        """Pass on a message."""
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for receiver in self._clients:
            if any(topic_matches_sub(pattern, topic) for pattern in receiver.subscriptions):
                self.held.append(Held(receiver, topic, payload))

    def give_retained(self, client: HeldClient, pattern: str) -> None:
        """Answer a subscription."""
        for topic, payload in self._retained.items():
            if topic_matches_sub(pattern, topic):
                self.held.append(Held(client, topic, payload))

    def knows(self, client: HeldClient) -> bool:
        """Whether a client is connected."""
        return client in self._clients


class HeldClient:
    """One client, with the methods of `frostline.protocol.connection.Connection`."""

    def __init__(self, broker: HeldBroker, client_id: str, will: Will | None) -> None:
        self.client_id = client_id
        self.will = will
        self.subscriptions: list[str] = []
        self.on_message: Callable[[str, bytes], None] = lambda topic, payload: None
        self.on_connected: Callable[[], None] = lambda: None
        self._broker = broker
        self._dead = False

    @property
    def connected(self) -> bool:
        return self._broker.knows(self)

    async def open(self, *, patient: bool = False) -> None:
        self._broker.welcome(self)

    async def close(self) -> None:
        self._broker.part(self, with_will=False)

    def cut(self, seconds: float) -> None:
        """Lose the link for so long."""
        self._broker.part(self)
        self._broker.loop.call_later(seconds, self._return)

    def die(self) -> None:
        """Be one of a process that was killed: nothing is heard of it any more."""
        self._dead = True
        self._broker.part(self)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        if self.connected and self._broker.published(self, topic, payload):
            self._broker.take(self, topic, payload, retain=retain)

    def subscribe(self, topic: str, qos: int = 1) -> None:
        if topic not in self.subscriptions:
            self.subscriptions.append(topic)
        if self.connected:
            self._broker.give_retained(self, topic)

    def unsubscribe(self, topic: str) -> None:
        if topic in self.subscriptions:
            self.subscriptions.remove(topic)

    def _return(self) -> None:
        if not self._dead and not self.connected:
            self._broker.welcome(self)
