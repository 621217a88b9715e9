"""The runner of vLLM on a CPU, under Python 3.11 in `.venv-peers`.

It steps `LLMEngine` in this process, as vLLM's own `LLM.generate` does, but asks for each step's
tokens: the time of a token is when its step has returned, text included. That is the least that
lies between vLLM and a reader; its server adds a second process and messages between the two.
"""

from __future__ import annotations

import itertools
import os
import time

from benchmarks.peers.protocol import Answer, Request, Round, channel, parser


def main() -> None:
    """Load vLLM and run rounds."""
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="a Hugging Face folder")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    options.add_argument("--max-num-seqs", type=int, required=True)
    options.add_argument("--max-model-len", type=int, required=True)
    options.add_argument("--no-prefix-caching", action="store_true")
    asked = options.parse_args()
    with channel(asked.cores) as line:
        # Before vLLM is imported: it reads them then. Its cache space comes from `compare`.
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": asked.cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm  # type: ignore[missing-import]
        from vllm import LLM, SamplingParams  # type: ignore[missing-import]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[missing-import]

        engine = LLM(
            asked.model,
            dtype=asked.dtype,
            enforce_eager=asked.eager,
            enable_prefix_caching=not asked.no_prefix_caching,
            max_model_len=asked.max_model_len,
            max_num_seqs=asked.max_num_seqs,
            seed=0,
        ).llm_engine
        names = itertools.count()

        def run(requests: list[Request]) -> Round:
            if not engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not empty its prefix cache")
            answers: dict[str, Answer] = {}
            begin = time.perf_counter()
            for request in requests:
                sampling = SamplingParams(
                    temperature=0.0,
                    max_tokens=request.max_tokens,
                    ignore_eos=True,
                    output_kind=RequestOutputKind.DELTA,
                )
                name = str(next(names))
                answers[name] = Answer(prompt_tokens=len(request.prompt_ids))
                engine.add_request(name, {"prompt_token_ids": request.prompt_ids}, sampling)
            while engine.has_unfinished_requests():
                outputs = engine.step()
                now = time.perf_counter() - begin
                for output in outputs:
                    answer, delta = answers[output.request_id], output.outputs[0]
                    if delta.token_ids:
                        answer.arrived.append((now, len(delta.token_ids)))
                        answer.token_ids += delta.token_ids
                        answer.text += delta.text
                    if output.finished:
                        answer.end = now
                        answer.cached_tokens = output.num_cached_tokens or 0
            return Round(time.perf_counter() - begin, list(answers.values()))

        line.serve(f"vLLM {vllm.__version__}", run)


if __name__ == "__main__":
    main()
