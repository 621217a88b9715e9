"""Models by name, `hf:org/name[@revision]`, through huggingface_hub and its cache.

Only safetensors and JSON are fetched; every failure says what to do next.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.weights.checkpoint import TOKENIZER_FILES, WeightsError

# Weights as safetensors, and what the tokenizer and the configuration need. No pickles.
PATTERNS = ["config.json", "*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
# Copies of the same weights in other layouts, which some models bring along.
IGNORED = ["*/*", "consolidated*.safetensors"]


def download(source: str) -> Path:
    """The local folder of a hub model; what isn't cached yet is downloaded.

    Args:
      source: `hf:org/name` or `hf:org/name@revision` (a branch, tag or commit).

    Raises:
      WeightsError: the name is malformed, the model or revision doesn't exist, it needs a
        login, or the hub can't be reached and the cache doesn't have it.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not match:
        raise WeightsError(source, "is not of the form hf:org/name or hf:org/name@revision")
    repo, revision = match.groups()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED
        )
        return Path(folder)
    except HFValidationError as error:
        reason = str(error)
    except GatedRepoError:
        reason = "needs a login: accept its terms on its page and set HF_TOKEN"
    except RevisionNotFoundError:
        reason = f"the hub has the model but no revision {revision}"
    except RepositoryNotFoundError:
        reason = "the hub has no such public model; if it is private, set HF_TOKEN"
    except LocalEntryNotFoundError:
        reason = (
            "is not in the local cache, and the hub can't be reached (or HF_HUB_OFFLINE is "
            f"set); go online once, or copy the model's folder here and give its path. "
            f"`hf download {repo}` on another machine fetches it"
        )
    except OSError as error:
        # No space, no permission, or a connection that broke half-way.
        reason = f"the download failed: {error}"
    raise WeightsError(source, reason)
