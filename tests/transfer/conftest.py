"""The fixtures of the hub's tests."""

from tests.hub.conftest import cache as cache
from tests.hub.conftest import server as server
from tests.hub.conftest import token as token
from tests.hub.conftest import waits as waits
