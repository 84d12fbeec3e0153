import json
def test_x(ranks, tiny, tmp_path):
    for i,extra in enumerate((["deepspeed=zero3","precision=bf16"], ["deepspeed=zero1","precision=bf16","fp8=rowwise"], ["deepspeed=zero0","precision=bf16_autocast"])):
        for c in ("false","true"):
            d=tmp_path/f"{i}{c}"
            job=ranks.start([*tiny, f"output_dir={d}/run", *extra, f"compile={c}", "max_steps=4"],2,d)
            codes=job.wait()
            if codes!=[0,0]: print(job.output()[-4000:])
            print(extra,c,codes,[json.loads(l)["train/loss"] for l in (d/"run"/"metrics.jsonl").read_text().splitlines()])
