"""Protobuf ↔ the dataclasses of `inkwell.types`; the clients know only the latter.

Requests are checked by the server, where the rules are; here only what protobuf itself cannot carry is refused.
"""
