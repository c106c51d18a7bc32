"""An image's config: what is none is refused, by whoever reads it."""

import pytest

from fusestore.errors import BadInput
from fusestore.imageconfig import extend, parse, settings_of


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("oops", "config in the image's config is no object: mend the image"),
        (["oops"], "config in the image's config is no object"),
        ({"Cmd": "sh"}, "Cmd in the image's config is no list of texts"),
        ({"Cmd": {"sh": "-c"}}, "Cmd in the image's config is no list of texts"),
        ({"Entrypoint": ["sh", 1]}, "Entrypoint in the image's config is no list of texts"),
        ({"Env": [None]}, "Env in the image's config is no list of texts"),
        ({"Env": 7}, "Env in the image's config is no list of texts"),
        ({"OnBuild": "RUN x"}, "OnBuild in the image's config is no list of texts"),
        ({"User": 1000}, "User in the image's config is no text"),
        ({"User": ["app"]}, "User in the image's config is no text"),
        ({"WorkingDir": ["/"]}, "WorkingDir in the image's config is no text"),
        ({"Volumes": ["/data"]}, "Volumes in the image's config is no object of texts"),
        ({"ExposedPorts": 80}, "ExposedPorts in the image's config is no object of texts"),
        ({"Labels": ["a"]}, "Labels in the image's config is no object of texts"),
        ({"Labels": {"a": 1}}, "Labels in the image's config is no object of texts"),
    ],
)
def test_what_is_no_config_is_refused(settings: object, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        settings_of({"config": settings})
    with pytest.raises(BadInput, match=said):
        parse(["USER app"])({"config": settings})


def test_what_nobody_reads_is_kept_as_it_is() -> None:
    settings = {"Healthcheck": {"Interval": 1}, "Volumes": {"/data": {}}, "Cmd": None}
    assert settings_of({"config": settings}) == {"Healthcheck": {"Interval": 1}, "Volumes": {"/data": {}}}


@pytest.mark.parametrize("history", ["oops", 5, {"a": 1}])
def test_a_history_that_is_none_is_refused(history: object) -> None:
    with pytest.raises(BadInput, match="history in the image's config is no list: mend the image"):
        extend({"history": history}, None, {"created": "2020-01-01T00:00:00Z"})
