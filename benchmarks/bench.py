"""Times of the operator, the transformer, the VAE and a stream on this machine, at Wan-1.3B's sizes.

    rehyat bench [--parts operator dit vae stream] [--tiny]

One JSON line for each case, and a file for each part in the folder given; beside a time the least that its arithmetic
takes on this device, and what was last recorded for it, with the commit. A run slower by 5 % says so. What is ours
alone: the same with the peers beside it is ``python -m benchmarks.hybrid_operator`` and so on. For a machine without an
accelerator there is ``--tiny``, whose sizes mean nothing.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator, Sequence

PARTS = ("operator", "dit", "vae", "stream")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rehyat bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing: to try the program itself")
    parser.add_argument("--seconds", type=float, default=900, help="of each part; after these, no case is begun")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder")
    given = parser.parse_args(argv)

    from rehyat_jax.runtime.files import check_writable

    for part in given.parts:
        check_writable(given.out / f"{part}.json")

    from benchmarks.timing import Report

    for part in given.parts:
        report = Report(given.out / f"{part}.json", given.seconds)
        report.run_all((case, measure) for case, measure in _cases(part, given.tiny) if not of_a_peer(case))


def of_a_peer(case: str) -> bool:
    return case.startswith("softmax") or "chunks as batch" in case or "plain scan" in case


def _cases(part: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    from benchmarks import dit, hybrid_operator, stream, vae
    from rehyat_jax.models.wan.config import VAEConfig, WanConfig

    lengths = [6] if tiny else [21, 41, 81, 161]
    transformer, autoencoder = (dit.TINY, vae.TINY) if tiny else (WanConfig.t2v_1_3b(), VAEConfig())
    latent = (8, 8) if tiny else (60, 104)
    match part:
        case "operator":
            return hybrid_operator.cases(hybrid_operator.TINY if tiny else hybrid_operator.Sizes(), lengths)
        case "dit":
            return dit.cases(transformer, lengths, latent)
        case "vae":
            return vae.cases(autoencoder, latent, 9 if tiny else 81)
        case _:
            return stream.cases(transformer, autoencoder, latent)


if __name__ == "__main__":
    main()
