"""select: gradient table -> selection table, and the selected examples (partition-and-merge greedy DPP; Ray tasks)."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from raydpp import runs
from raydpp.cluster import Here, tasks_for, unwrap_task_errors
from raydpp.dpp.budget import Budget, count_of
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.errors import UserError, checked_seed
from raydpp.select.earlier import Earlier
from raydpp.select.inputs import (
    Owned,
    SelectionJob,
    check_tokens,
    digest,
    find_owned,
    fit_objective,
    join_scores,
    partitioned,
    quality_scales,
    score_files,
    source_counts,
)
from raydpp.select.partition_cache import PartitionCache
from raydpp.select.request import Request, parse_quotas, parse_score
from raydpp.select.target import TARGET, TargetScore, check_targets, score_by_target
from raydpp.storage import Folder, absolute
from raydpp.tables import Part, open_table

log = logging.getLogger(__name__)

Method = Literal[
    "greedy", "random", "quality", "length", "k-center", "k-means", "facility-location", "dedup", "round-robin"
]


def select(
    table: str,
    out: str,
    size: int | float | None = None,
    *,
    tokens: int | None = None,
    min_log_gain: float | None = None,
    min_per_source: list[str] | None = None,
    max_per_source: list[str] | None = None,
    keep_mix: float = 0.0,
    owned: list[str] | None = None,
    exclude: list[str] | None = None,
    complete: str | None = None,
    arrivals: bool = False,
    kernel: Literal["rbf", "cosine"] = "rbf",
    gamma: float | Literal["auto"] = "auto",
    ridge: float | None = None,
    quality_weight: float = 0.0,
    quality_scale: Literal["spread", "quantiles"] = "spread",
    scales_from: str | None = None,
    quality: list[str] | None = None,
    scores: list[str] | None = None,
    target: list[str] | None = None,
    target_score: TargetScore = "mean",
    checkpoints: list[str] | None = None,
    cost_column: str = "response_tokens",
    oracle: Literal["auto", "textbook", "cholesky", "feature-space"] = "auto",
    method: Method = "greedy",
    compare: bool = False,
    redundancy: Literal["auto", "always", "never"] = "auto",
    prune_below: float = 0.1,
    seed: int = 0,
    threshold: float = 0.95,
    partitions: int | None = None,
    partition_cache: str | None = None,
    exact: bool = False,
    dry_run: bool = False,
    preview: bool = False,
    oversample: float = 4.0,
    certify: bool = True,
    corpus: str | None = None,
    feature_column: str = "gradient",
    address: str | None = None,
) -> runs.RunResult:
    """Select the subset worth training on: greedy MAP of a determinantal point process over the gradients.

    Each partition of the table (a set of its files, read by the task that works on it) picks more than its share;
    the picks of all partitions are selected from again. With one partition the result is exact greedy. OUT/selection
    holds the picks in order, OUT/examples.jsonl the conversations, ready to fine-tune on, OUT/gradients their rows of
    the gradient table, OUT/redundancy what each example left out is nearest to, OUT/map/map.parquet where examples lie
    in a plane, with their texts, for embedding-atlas. OUT/report.html shows all of it and what each pick adds, where
    the picks come from and how long they are; OUT/plots its figures as PNG.

    Greedy is nested: every first part of the selection is the selection for a smaller budget, and raydpp cut takes one
    without a new search. Ctrl-C during the search keeps the picks so far.

    Args:
        table: Output folder of raydpp extract, or a Parquet file with the columns id and --feature-column.

    What to select by:
        kernel: Similarity of two examples: rbf, exp(-gamma ||x - y||^2), or cosine, <x, y>.
        gamma: Inverse squared length scale of the rbf kernel; larger counts only closer examples as similar. auto: 2
            over the median squared distance of two examples, from a sample; about 1 for gradients.
        ridge: Added to the kernel's diagonal; default 0 for rbf, 0.1 for cosine.
        quality_weight: w, from 0 (diversity alone) to 1 (quality alone): the objective is
            (1 - w) log det K + w u (sum of quality).
        quality_scale: What quality is beside diversity: spread, each score standardised, and u the spread of log
            residuals at the budget, from a sample, so that 0.5 weighs both alike by any kernel; or quantiles, each
            score 0 to 1 between its 1 % and 99 % quantiles, and u one nat (Wang et al. 2024).
        scales_from: An earlier selection (output folder of raydpp select) whose gamma, where it is auto, and whose
            scale of quality hold here too, so that selections of a table that grows compare.
        quality: The columns of the table that say how good an example is, COLUMN or COLUMN=WEIGHT, a negative weight
            where less is better; each is standardised by its median and median absolute deviation. Default the
            response's length.
        scores: Files of your own numbers, joined to the table by id, whose columns --quality and --cost-column can
            name too: Parquet, CSV, JSON or JSON lines with a column id, or folders of them. Each example needs a
            number, but those of --owned and --exclude.
        target: What to aim at: output folders of raydpp extract (of a validation set, made with the same options as the
            table), or Parquet files. An example's score, the column target, is its cosine with the mean of the source
            of them that it is nearest to; default --quality is this score. With --quality-weight 1 the selection is the
            top by similarity to the target (LESS, Xia et al. 2024), below it diverse too. Where the targets are part of
            the table, --exclude them. Targets may be plain gradients (--optimizer sgd) where the table's are Adam's, as
            LESS has it.
        target_score: What that score is: mean, as above; nearest, the cosine with the nearest single example of the
            target; conflict-aware, that of mean plus the cosine with the mean of the farthest source where it is
            negative: what helps one source and harms another counts less.
        checkpoints: Output folders of raydpp extract of the same conversations at other checkpoints of the run that
            trained the table's adapter, each with a --target of its own. The cosine with a source is then the mean over
            checkpoints, weighed by their learning rates. Diversity is that of the table.
        method: greedy, or a baseline: random, quality, length (longest first), k-center, k-means (medoids),
            facility-location (every example near a pick), dedup (semantic de-duplication by --threshold), round-robin
            (for each example of --target in turn the nearest that is left, or with several sources for each source in
            turn; over --representation weighted-hidden this is RDS+, Ivison et al. 2025; needs no --quality-weight).
        seed: Of what is random in a baseline.
        threshold: The cosine similarity from which dedup calls two examples the same.
        feature_column: The column with the features, where the table was not written by raydpp extract.

    Budget:
        size: How many examples: a whole number, or a fraction of the table such as 0.1. One of --size, --tokens and
            --min-log-gain is needed; each ends the run.
        tokens: The most tokens (sum of --cost-column). What an example adds then counts per token, and what no longer
            fits is passed over.
        min_log_gain: Stop when the next example adds less than this, in nats.
        cost_column: What --tokens counts.

    Per source:
        min_per_source: The least examples of a source, if it has as many: SOURCE=NUMBER, or SOURCE=FRACTION of --size;
            *=... is for every other source.
        max_per_source: The most examples of a source, in the same form.
        keep_mix: The least of every source without a minimum of its own, as a part of its share of the table: 1 keeps
            the mix of the table, 0.5 half of it. Diversity alone all but leaves out a source whose examples are alike,
            and a model then does not learn it.

    Already owned:
        owned: What you have already: output folders of raydpp extract or select, Parquet files, or files of ids. It
            counts as picked before the first pick, so that the selection completes it, and is not picked again.
        exclude: What is never to be picked, in the same forms.
        complete: An earlier selection from this table (output folder of raydpp select) to complete: those of its picks
            that are still in the table come first, and count in the budget. Its scales hold, as by --scales-from.
        arrivals: Whether to pick only from files that the table did not have when --complete was selected, and to let
            the budget count these picks alone: a daily selection, whose cost is that of what has come since.

    Scale:
        partitions: How many partitions; default one for every 65536 rows. At most the number of the table's files.
        partition_cache: Folder where the picks of each partition are kept: of a table that has grown since, partitions
            of the same files are not searched again by the same options. Partitions are then filled in the order in
            which files came, with 65536 rows each.
        exact: Whether to search all partitions at once, in rounds, which gives the picks of one partition; each is kept
            in the memory of an actor. Killed, the same command resumes from the picks it had.
        oversample: How many times its share a partition picks; more loses less against exact greedy and costs more.
        certify: Whether to look, after a merge, at what every example left would still add: how much the partitions may
            have lost.
        oracle: How gains are computed: textbook, cholesky, feature-space (cosine with a ridge), or auto. The picks are
            the same.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
        dry_run: Whether only to say what tasks the selection takes, their memory and their time.

    Output:
        out: Folder to write; it must be new, empty, or this same run's.
        preview: Whether only to show, in seconds from a sample, what a handful of gammas and quality weights would
            select beside the ones given: what the last pick adds, the source mix, lengths, the overlap. Writes
            OUT/preview.html and nothing else.
        compare: Whether to run every baseline at the same budget as well, and to print one table of log det, log-det
            distance, quality and source mix.
        redundancy: Whether to write OUT/redundancy: for each example left out the nearest selected one, and the share
            of its variance that the selection explains. auto: where it takes no more than about a minute.
        prune_below: Say from which pick on an example adds less than this share of its variance: what comes after could
            be pruned.
        corpus: Output folder of raydpp ingest to take the conversations from; default the one the table was made of.
    """
    lists = [urls or [] for urls in (owned, exclude, scores, target, checkpoints)]
    given = [table, out, *itertools.chain(*lists), *filter(None, (corpus, complete, scales_from, partition_cache))]
    table, out = absolute(table), absolute(out)
    corpus, complete, scales_from, partition_cache = (
        absolute(url) if url else None for url in (corpus, complete, scales_from, partition_cache)
    )
    owned, exclude, scores, target, checkpoints = ([absolute(url) for url in urls] for urls in lists)
    if target and not quality:
        quality = [TARGET]
    config = {name: value for name, value in locals().items() if name not in ("dry_run", "preview", "given", "lists")}
    if size is None and tokens is None and min_log_gain is None:
        raise UserError("no budget: give --size, --tokens or --min-log-gain")
    if oversample < 1:
        raise UserError(f"--oversample {oversample}: below 1 the partitions hand in fewer picks than are wanted")
    if partitions is not None and partitions < 1:
        raise UserError(f"--partitions {partitions}: at least one is needed")
    if method not in get_args(Method):
        raise UserError(f"--method {method}: use one of {', '.join(get_args(Method))}")
    if redundancy not in ("auto", "always", "never"):
        raise UserError(f"--redundancy {redundancy}: use auto, always or never")
    if not 0 < prune_below < 1:
        raise UserError(f"--prune-below {prune_below:g}: give a share between 0 and 1")
    if target_score not in get_args(TargetScore):
        raise UserError(f"--target-score {target_score}: use one of {', '.join(get_args(TargetScore))}")
    checked_seed("--seed", seed)
    if arrivals and not complete:
        raise UserError("--arrivals are what has come since an earlier selection: name it with --complete")
    if complete and (exact or method != "greedy" or preview):
        raise UserError("--complete is for greedy in partitions: leave out --exact, --method and --preview")
    if partition_cache and (partitions is not None or exact):
        raise UserError("--partition-cache fills its own partitions: leave out --partitions and --exact")
    if target and quality_weight == 0 and method == "greedy" and not preview:
        raise UserError("--target counts by --quality-weight, which is 0: give one, such as 0.5, or 1 for the nearest")
    if checkpoints and target_score == "nearest":
        raise UserError("--checkpoints average the cosines with sources: use --target-score mean or conflict-aware")
    if not target and (method == "round-robin" or target_score != "mean"):
        option = "--method round-robin" if method == "round-robin" else f"--target-score {target_score}"
        raise UserError(f"{option} needs something to aim at: give --target")
    judged = tuple(parse_score(text) for text in quality or [cost_column])
    objective = Objective(Kernel(kernel, 1.0 if gamma == "auto" else gamma, ridge), quality_weight)
    least = parse_quotas("--min-per-source", min_per_source or [])
    most = parse_quotas("--max-per-source", max_per_source or [])
    budget = Budget(size, tokens, least, most, min_log_gain)
    if not 0.0 <= keep_mix <= 1.0:
        raise UserError(f"--keep-mix {keep_mix:g}: give a part of each source's share, from 0 to 1")
    full = opened = open_table(table, feature_column)
    earlier = Earlier.at(complete or scales_from or "", objective.kernel) if complete or scales_from else None
    if arrivals and earlier:
        opened = earlier.since(full)
    targets = [open_table(url, opened.column) for url in target]
    elsewhere = [open_table(url, opened.column) for url in checkpoints]
    aims = check_targets(opened, targets, elsewhere)
    count = None if size is None else count_of(size, opened.rows)
    if count is not None and method == "greedy" and quality_weight < 1:
        objective.kernel.check_budget(count, opened.dimension)
    asked = replace(budget, size=count, minimum={}, maximum={})
    request = Request(asked, objective, opened.column, cost=cost_column, oracle=oracle)
    stable = partition_cache is not None
    alone = not exact and len(partitioned(opened, partitions, exact, Here(), stable)) == 1
    if dry_run:
        from raydpp.select.plan import estimate

        tasks = tasks_for("select", address, given, alone)
        groups = partitioned(opened, partitions, exact, tasks, stable)
        return estimate(SelectionJob(opened, groups, request, Owned.nothing(), "select", tasks), exact, oversample, out)
    corpus = corpus or opened.corpus
    corpus_run = runs.load_finished(["ingest"], Folder.at(corpus)) if corpus else None
    files = score_files(scores)
    identity: dict[str, Any] = {"table": opened.identity, "corpus": corpus_run and runs.identity(corpus_run)}
    if targets:
        identity["target"] = [one.identity for one in targets]
    if elsewhere:
        identity["checkpoints"] = [one.identity for one in elsewhere]
    if earlier:
        identity["earlier"] = runs.identity(earlier.record)
    rows = opened.rows
    if preview:
        from raydpp.select.preview import SAMPLE
        from raydpp.select.preview import preview as show
    else:
        run = runs.begin("select", config, [identity, *map(digest, files)], keep=exact)
        if run.done:
            return run.done
    # torch takes seconds: mistakes, and what is done already, are found before it is loaded
    from raydpp.diversity.redundancy import prune_rank
    from raydpp.select import compare as comparing
    from raydpp.select.compare import Choice, pick_baselines
    from raydpp.select.distributed import greedy
    from raydpp.select.left_out import LONGEST, is_cheap, look_at_left_out
    from raydpp.select.lengths import lengths, lengths_section, table_lengths
    from raydpp.select.map import selection_map
    from raydpp.select.outputs import (
        Distances,
        about,
        cost_section,
        read_examples,
        read_texts,
        write_dataset,
        write_selection,
    )

    tasks = tasks_for("select", address, given, alone)
    with unwrap_task_errors():
        have = find_owned(tasks, owned, exclude, opened)
        if have.unknown:
            log.warning("select: %d of the ids owned are in no table: they cannot be taken into account", have.unknown)
        if preview:
            opened = replace(opened, parts=opened.some_parts(SAMPLE))
        named = [score.column for score in judged if not (target and score.column == TARGET)]
        opened = join_scores(tasks, opened, files, [*named, cost_column], have.excluded)
        groups = partitioned(opened, partitions, exact, tasks, stable)
        if targets:
            opened = score_by_target(tasks, [opened, *elsewhere], groups, aims, target_score)
        if tokens is not None and not preview:
            check_tokens(tasks, opened, cost_column, tokens, have.excluded)
        counts = source_counts(opened) if opened.has("source") else {}
        counted = (quality_weight > 0 or method == "quality" or compare or preview) and (
            quality or opened.has(cost_column)
        )
        scales = earlier.scores(judged) if earlier and counted else None
        if counted and scales is None:
            scales = quality_scales(tasks, opened, judged, quality_scale == "quantiles")
        if earlier:
            objective = earlier.scaled(objective, gamma == "auto")
        else:
            objective = fit_objective(tasks, opened, objective, gamma == "auto", quality_scale == "spread", count)
        request = replace(
            request,
            objective=objective,
            quality=scales or (),
            budget=budget.in_counts(rows, [str(source) for source in counts]),
        )
        if keep_mix:
            if not counts:
                raise UserError(f"--keep-mix: {opened.name} has no column source")
            request = replace(request, budget=request.budget.keeping_mix(keep_mix, counts))
        job = SelectionJob(opened, groups, request, have, "select", tasks, aims[0])
        if preview:
            return show(job, rows, quality_scale == "spread", out)
        shares = len(job.partitions)
        wanted = "as many" if count is None else f"{count:,}"
        log.info("select: %s of %s examples, %d partition%s", wanted, f"{opened.rows:,}", shares, "s" * (shares > 1))
        log.info("select: %s", request.objective)
        certificate, kept = None, None
        if method != "greedy":
            picked = pick_baselines(job, [Choice(method, seed, threshold)])[method]
        else:
            record = Part(run.out, "rounds/picks.parquet")
            kept = earlier.picks(full, job) if complete and earlier else None
            search = kept.search(job, arrivals) if kept else job
            if search and partition_cache:
                known = [identity.get("target"), identity.get("checkpoints"), *map(digest, files)]
                cache = PartitionCache.at(partition_cache, search.given.excluded.to_pylist(), known)
                search = replace(search, cache=cache)
            if search:
                picked, certificate = greedy(search, record, exact=exact, oversample=oversample, certified=certify)
            if kept:
                picked = kept.joined(picked if search else None)
        chosen = picked.rows
        if not len(chosen):
            why = picked.selection.stopped or "the budget is too small for any example"
            raise UserError(f"nothing was picked: {why}")
        write_selection(run, picked, request)
        gains = picked.selection.log_gains
        examples = read_examples(tasks, Folder.at(corpus), chosen["id"].to_pylist(), gains) if corpus else []
        others = beside = []
        if compare and not picked.interrupted:
            others = beside = comparing.with_baselines(job, picked, method, seed, threshold)
        elif not picked.interrupted:
            beside = comparing.beside_random(job, picked, method, seed)
        more, left, seconds = [], None, dict(picked.seconds)
        if cost_column in chosen.column_names:
            found = {"the whole": table_lengths(opened, cost_column), "selection": lengths(chosen, cost_column)}
            more.append(lengths_section(found, cost_column))
        if not picked.interrupted:
            began = time.monotonic()
            more.append(selection_map(job, picked, Folder.at(corpus) if corpus else None, run.out))
            seconds["map"] = time.monotonic() - began
        if not picked.interrupted and (redundancy == "always" or (redundancy == "auto" and is_cheap(job, len(chosen)))):
            began = time.monotonic()
            left = look_at_left_out(job, picked, run.out)
            log.info("select: %s", left)
            ids = [pair[name] for pair in left.pairs for name in ("id", "nearest")]
            more.append(left.section(read_texts(tasks, Folder.at(corpus), ids, LONGEST) if corpus else {}))
            seconds["left out"] = time.monotonic() - began
        pruned = prune_rank(gains, request.objective.kernel, prune_below)
    how = method if method != "greedy" else "exact greedy" if exact or shares == 1 else f"{shares} partitions"
    stopped, log_det = picked.selection.stopped, picked.selection.log_det
    summary = (
        f"select: {len(chosen):,} of {opened.rows:,} examples of {opened.name} by {how},"
        f" log det {log_det:,.2f} nats{' given what is owned' if have.count else ''} -> {run.out}"
    )
    if pruned:
        log.info("select: from pick %s on, each adds less than %g of an example's variance", f"{pruned:,}", prune_below)
    if stopped:
        log.warning("select: %s", stopped)
        summary += f" ({stopped})"
    whole = {source: rows / opened.rows for source, rows in counts.items()}
    card = about(opened, request, how, config)
    if examples:
        curves = {one["method"]: one["curve"] for one in beside if one["method"] in (method, "random")}
        write_dataset(run.out, examples, card, log_det, whole, Distances(method, curves))
    facts: dict[str, Any] = {
        "fingerprint": opened.fingerprint,
        "corpus": corpus,
        "feature_column": opened.column,
        "learning_rate": opened.learning_rate,
        "counts": {
            "in": opened.rows,
            "asked": count,
            "rows": len(chosen),
            "partitions": shares,
            "owned": have.count,
            "kept": len(kept.rows) if kept else 0,
            "owned_unknown": have.unknown,
        },
        "log_det": log_det,
        "gamma": request.objective.kernel.gamma if kernel == "rbf" else None,
        "quality_unit": request.objective.quality_unit,
        "quality": [asdict(score) for score in request.quality],
        "table_files": {part.name: part.rows for part in full.parts},
        "sources": counts,
        "partition_cache": list(picked.kept),
        "rounds": picked.rounds,
        "seconds": {part: round(took, 1) for part, took in seconds.items()},
        "certificate": certificate and certificate.facts,
        "oracle": picked.selection.oracle,
        "stopped": stopped,
        "prune_rank": pruned,
        "left_out": left and left.facts,
        "card": card,
        "nested_unless": {"minimum": bool(min_per_source or keep_mix), "tokens": tokens is not None},
    }
    comparing.write_report(run.out, picked, whole, others, summary, pruned, [*more, cost_section(facts)])
    if picked.interrupted:
        return run.interrupt(
            summary, **facts, next=f"raydpp cut {run.out} --size {len(chosen)} --out NEW keeps these picks"
        )
    if others:
        facts["comparison"] = [{name: value for name, value in one.items() if name != "curve"} for one in others]
        facts["tables"] = [comparing.comparison_table(others).record]
        run.out.write_json("comparison.json", others)
    return run.finish(summary, **facts)
