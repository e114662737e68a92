"""RDMA devices for tests on machines that have none: soft-RoCE in a throw-away virtual machine."""

__version__ = "0.1.0"
