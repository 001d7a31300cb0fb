"""From nothing to weights: `python -m model_host.starter` gathers, learns the vocabulary, trains, exports. Resumable at every stage.

What a stage has finished lies in `--work` and is not done again; training goes on from its last saved state. Development
only: needs pip's network for the corpus, and nothing of it is used at run time.
"""

import argparse
import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from model_host.config import ModelConfig, Yarn
from model_host.starter import corpus, pairs, vocabulary
from model_host.starter.corpus import Document
from model_host.starter.examples import FIM_RATE, ExampleSource
from model_host.starter.train import Plan, Run, export

VOCABULARY_SAMPLE_CHARS = 120_000_000
HELD_OUT_ONE_IN = 200
HELD_OUT_SEQUENCES = 64


def configuration(hidden: int, layers: int, experts: int, vocabulary_size: int) -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=vocabulary_size,
        hidden_size=hidden,
        intermediate_size=hidden * 16 // 5,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 40,
        first_k_dense_replace=1,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=experts,
        n_shared_experts=2,
        num_experts_per_tok=6,
        yarn=Yarn(factor=4.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
        max_position_embeddings=16_384,
        bos_token_id=vocabulary_size - 5,
        eos_token_id=vocabulary_size - 4,
    )


SIZES = {
    "shipped": configuration(320, 8, 32, 8192),
    "small": configuration(160, 5, 16, 8192),
}
"""`shipped` wants a GPU (about 25 minutes on one H200); `small` learns the syntax of Python on a laptop's CPU in some hours."""


def is_held_out(document: Document) -> bool:
    return zlib.crc32(document.path.encode()) % HELD_OUT_ONE_IN == 0


def vocabulary_sample(source: Path, total_chars: int) -> Iterator[str]:
    chance = random.Random(0)
    for document in corpus.read(source):
        if chance.random() < VOCABULARY_SAMPLE_CHARS / total_chars:
            yield document.text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model_host.starter", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="corpus, vocabulary, state and log (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint", help="where the checkpoint goes")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="evaluation files whose prompts must not be in the corpus")
    parser.add_argument("--size", choices=SIZES, default="shipped")
    parser.add_argument("--minutes", type=float, default=9.0, help="train at most this long, then save and stop; run again to go on")
    parser.add_argument("--steps", type=int, default=8000, help="length of the whole plan")
    parser.add_argument("--tokens-per-step", type=int, default=131_072)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--long-context", type=int, default=16_384, help="tokens of a sequence, every second of the last steps")
    parser.add_argument("--start", type=Path, help="begin with this checkpoint instead of random numbers")
    parser.add_argument("--fim-rate", type=float, default=FIM_RATE, help="share of documents with a hole (default: %(default)s)")
    parser.add_argument("--answers-only", action="store_true", help="learn from the middles of those alone, as a last stage")
    parser.add_argument("--run", help="name of the run's state below --work (default: the size)")
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="another one shows a later stage other holes in other documents")
    parser.add_argument("--report-every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    return parser.parse_args()


def main() -> None:
    choice = parse()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked, one process a core
    torch.set_float32_matmul_precision("high")
    work: Path = choice.work
    config = SIZES[choice.size]
    source = corpus.gather(work, choice.held_out)
    total_chars = sum(part["chars"] for part in corpus.contents(work))
    tokenizer_file = vocabulary.learn(vocabulary_sample(source, total_chars), config.vocab_size, work / "vocabulary")
    pair_file = pairs.write(corpus.read(source), work / "pairs.jsonl.xz")

    documents = list(corpus.read(source))
    shown = [d for d in documents if not is_held_out(d)]
    held_out = ExampleSource([d for d in documents if is_held_out(d)], [], vocabulary.load(tokenizer_file), choice.fim_rate)
    examples = ExampleSource(shown, pairs.read(pair_file), vocabulary.load(tokenizer_file), choice.fim_rate)
    plan = Plan(
        steps=choice.steps,
        tokens_per_step=choice.tokens_per_step,
        learning_rate=choice.rate,
        context=choice.context,
        long_context=choice.long_context,
        warmup_steps=choice.warmup_steps,
        seed=choice.seed,
        report_every=choice.report_every,
        answers_only=choice.answers_only,
    )
    folder = work / (choice.run or choice.size)
    run = Run(plan=plan, config=config, folder=folder, device=torch.device(choice.device), start=choice.start)
    check = torch.from_numpy(held_out.sequences(plan.context, HELD_OUT_SEQUENCES, seed=1).astype("int64"))
    finished = run.train(examples, check, choice.minutes, choice.workers)
    export(config, run.masters(), choice.output, tokenizer_file.parent)
    sys.stderr.write(f"wrote {choice.output}; {'finished' if finished else 'run the same command again to go on'}\n")


if __name__ == "__main__":
    main()
