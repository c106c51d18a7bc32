"""Make a container, look at it, throw it away: the Python API alone, no mount.

python examples/throwaway.py STORE IMAGE
"""

import json
import sys

from fusestore.errors import FusestoreError
from fusestore.store import Store


def main(store_path: str, image: str) -> None:
    with Store.open(store_path) as store:
        made = store.create_container(image_name=image, container_name="throwaway")
        try:
            command = made.config.get("config", {}).get("Cmd")
            print(f"{image} would run {command} in {made.id[:12]}")

            metadata = store.get_container_metadata("throwaway")
            metadata["purpose"] = "an example"
            store.set_container_metadata("throwaway", metadata)
            print(json.dumps(store.get_container_metadata(made.id), indent=2))

            (store.work_dir(made.id) / "notes").write_text("lives as long as the container\n")
        finally:
            store.delete_container(made.id)
        print("containers left:", len(store.container_ids()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (TypeError, FusestoreError) as error:
        sys.exit(f"throwaway: {error}")
