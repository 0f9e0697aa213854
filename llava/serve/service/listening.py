"""Sockets of the servers: port flags, sockets that are bound before a checkpoint is loaded, and addresses as text."""

from __future__ import annotations

import argparse
import socket

from llava.common.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. UserError if that is not possible."""
    try:
        # getaddrinfo finds the family: create_server takes an IPv6 address only with AF_INET6.
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None


def port_number(text: str) -> int:
    """argparse type of a port. 0 takes a free port."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a port from 0 to 65535")
    return int(text)


def shown_host(host: str) -> str:
    """A host in the form that URLs use: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host else host
