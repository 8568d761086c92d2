"""What every sink promises, whatever it keeps changes in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.receiver import Answer, receiving
from walstream.changes import Change, Column, Layout, Operation, Relation, Transaction
from walstream.destinations import Sink
from walstream.errors import SinkFailed
from walstream.lsn import Lsn
from walstream.projection import Mask, Projection
from walstream.sinks import stdout
from walstream.sinks.envelopes import Packing
from walstream.sinks.file import FileOptions, FileSink
from walstream.sinks.stdout import StdoutSink
from walstream.sinks.webhook import WebhookOptions, WebhookSink
from walstream.values import Types
