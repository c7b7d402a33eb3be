"""Byte-level BPE with V4's special tokens, and a border that untrusted text cannot cross.

Digits are split singly, so arithmetic sees one token a digit. Special tokens take the ids 0.. in the
order of `protocol.SPECIAL_TOKENS` (BOS 0, EOS 1, PAD 2). A released V4 `tokenizer.json` loads too.

Text is cut at the special tokens of trusted parts; what lies between, trusted or not, is merged and
tokenised as plain text. So tokenising by parts gives the ids of tokenising the whole text wherever the
untrusted text spells no special token, and a spelled-out `<｜User｜>` stays a handful of plain tokens.
SFT, rollouts and evaluation all come through `encode_parts`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from consilience.conf.errors import CheckpointError, ConfigError, ProtocolError, ProtocolFault
from consilience.rollout.protocol import BOS, EOS, PAD, SPECIAL_TOKENS

NUM_BYTES = 256


class Tokenizer:
    """Text to ids and back. Build it by `train`, `load` or `from_json`."""

    def __init__(self, serialized: str) -> None:
        """From the text of a `tokenizer.json`. CheckpointError if it is none, or lacks a V4 token."""
        try:
            layout = json.loads(serialized)
            self._full = BpeTokenizer.from_str(serialized)
            layout["added_tokens"] = []
            layout["post_processor"] = None
            self._plain = BpeTokenizer.from_str(json.dumps(layout, ensure_ascii=False))
        except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
            raise CheckpointError(f"not a tokenizer.json: {error}") from None
        added = self._full.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: i for i, token in sorted(added.items())}
        missing = [token for token in SPECIAL_TOKENS if token not in self.special_ids]
        if missing:
            raise CheckpointError(f"tokenizer lacks V4's special tokens {', '.join(missing)}; retrain it")
        self.vocab_size: int = self._full.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id, self.pad_id = (self.special_ids[t] for t in (BOS, EOS, PAD))
        self.digest: str = hashlib.sha256(serialized.encode()).hexdigest()
        self._serialized = serialized
        by_length = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-pair merges learned from `texts`, at most `vocab_size` ids in all; deterministic.

        Special tokens inside the texts are cut out, not learned. ConfigError if `vocab_size` cannot hold
        the special tokens and the 256 bytes.
        """
        smallest = len(SPECIAL_TOKENS) + NUM_BYTES
        if vocab_size < smallest:
            raise ConfigError(f"tokenizer vocab_size {vocab_size}; at least {smallest} (bytes and specials)")
        bpe = BpeTokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
        pieces = (piece for text in texts for piece in special.split(text) if piece)
        bpe.train_from_iterator(pieces, trainer)
        return cls(bpe.to_str(pretty=False))

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """From a `tokenizer.json`, or from the checkpoint folder that holds one."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from None

    def save(self, path: Path | str) -> None:
        """Write `tokenizer.json` (into `path` if that is a folder); `load` gives an equal digest."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        file.write_text(self._serialized, encoding="utf-8")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        return Tokenizer, (self._serialized,)

    def padded_vocab_size(self, multiple: int) -> int:
        """`vocab_size` rounded up to `multiple`; the ids beyond it exist in the model only."""
        return -(-self.vocab_size // multiple) * multiple

    def encode(self, text: str) -> list[int]:
        """Ids of text that our own encoder made: special tokens are recognised."""
        return self.encode_parts([(text, True)])

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text from outside: nothing in it becomes a special token."""
        return self.encode_parts([(text, False)])

    def encode_parts(self, parts: Iterable[Sequence]) -> list[int]:
        """Ids of (text, is_trusted, …) parts in order; special tokens only from trusted ones.

        A part whose fourth field is not None brings its ids along; text around it is tokenised without it.
        """
        ids: list[int] = []
        for run in self._runs(parts):
            if isinstance(run, tuple):
                ids += run
            else:
                ids += self._encode_run(run)
        return ids

    def encode_masked(self, parts: Sequence[Sequence]) -> tuple[list[int], list[int]]:
        """(ids, loss_mask) of (text, is_trusted, is_target) parts; the mask is 1 on targets.

        Targets start after a special token and end with one, so cutting there changes no id.
        """
        ids: list[int] = []
        mask: list[int] = []
        start = 0
        while start < len(parts):
            end = start
            while end < len(parts) and parts[end][2] == parts[start][2]:
                end += 1
            piece = self.encode_parts(parts[start:end])
            ids += piece
            mask += [int(parts[start][2])] * len(piece)
            start = end
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; for parsing and reading, never to encode again.

        Bytes that are not UTF-8 and ids beyond the vocabulary become U+FFFD.
        """
        if not ids or max(ids) < self.vocab_size:
            return self._full.decode(list(ids), skip_special_tokens=False)
        runs = itertools.groupby(ids, key=lambda i: i < self.vocab_size)
        return "".join(
            self._full.decode(list(run), skip_special_tokens=False) if is_known else "\ufffd" * len(list(run))
            for is_known, run in runs
        )

    def _runs(self, parts: Iterable[Sequence]) -> Iterator[tuple[int, ...] | str]:
        """Known ids and the plain text between them."""
        plain: list[str] = []
        for part in parts:
            if len(part) > 3 and part[3] is not None:
                if text := "".join(plain):
                    yield text
                plain = []
                yield tuple(part[3])
                continue
            if not part[1]:
                plain.append(part[0])
                continue
            for i, piece in enumerate(self._special.split(part[0])):
                if i % 2 == 0:
                    plain.append(piece)
                    continue
                if text := "".join(plain):
                    yield text
                plain = []
                yield (self.special_ids[piece],)
        if text := "".join(plain):
            yield text

    def _encode_run(self, text: str) -> list[int]:
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            message = f"text that is not valid Unicode cannot be tokenised: {error}"
            raise ProtocolError(ProtocolFault.UNICODE, message) from None
