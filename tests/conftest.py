"""Marks: `-m "not slow"` leaves out the tests that start processes of their own, for a run under two minutes."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts whole training runs as processes, with ranks and kills")


def pytest_collection_modifyitems(items):
    for item in items:
        if "uninterrupted" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
