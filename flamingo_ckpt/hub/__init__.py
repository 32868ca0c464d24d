"""The hub: files by repository, name and revision. Nothing else in the package touches the network.

`names` reads addresses, `download` and `upload` hand whole files to `huggingface_hub`, which knows
the cache, its place (`HF_HOME`), the endpoint (`HF_ENDPOINT`), offline mode (`HF_HUB_OFFLINE`) and
the login; `remote` reads ranges of files that stay where they are. What goes wrong becomes one
error that names the repository, the file, the revision and the way on. Tokens are handed to the
endpoint, never to another host, and never shown.
"""

from flamingo_ckpt.hub.download import CONFIG_FILES as CONFIG_FILES
from flamingo_ckpt.hub.download import cached_snapshot as cached_snapshot
from flamingo_ckpt.hub.download import download as download
from flamingo_ckpt.hub.download import remember_revision as remember_revision
from flamingo_ckpt.hub.download import snapshot as snapshot
from flamingo_ckpt.hub.names import URI_PREFIX as URI_PREFIX
from flamingo_ckpt.hub.names import HubUri as HubUri
from flamingo_ckpt.hub.names import LocalCopy as LocalCopy
from flamingo_ckpt.hub.names import is_offline as is_offline
from flamingo_ckpt.hub.names import is_repo_id as is_repo_id
from flamingo_ckpt.hub.names import is_uri as is_uri
from flamingo_ckpt.hub.names import parse_uri as parse_uri
