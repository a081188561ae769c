"""Configuration: the schema, files and flags read into it. Its modules import pydantic and yaml, never torch; it none of them,
so that commands without a config start without pydantic."""
