import pytest

from tests.transport.proxy.ends import Pair
from tests.transport.proxy.memory import Cable


@pytest.fixture
def pairs():
    """Makes pairs of links and closes them at the end."""
    made: list[Pair] = []

    def make(*cables: Cable, **options) -> Pair:
        made.append(Pair(*(cables or (Cable("tcp0"),)), **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()
