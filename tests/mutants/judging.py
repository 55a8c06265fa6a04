"""Mistakes in what judges SAEs, and the tests that must notice them: such as leave a plausible figure that is wrong."""

from . import Mutant

FIGURES_TESTS, PROTOCOL = "tests/evaluation/test_figures.py", "tests/evaluation/test_protocol.py"
LANGUAGE_MODEL = "tests/evaluation/test_evaluate.py"
STUDIES = "tests/studies/test_studies.py"
COLLECT = "tests/dashboards/test_collect.py"
WEIGHTS = "tests/dashboards/test_weights.py"

# ---- evaluation

BOOTSTRAP = [
    ("an end of either side too near", "[(1 - self.level) / 2, (1 + self.level) / 2]", "[1 - self.level, self.level]"),
    ("documents drawn without putting back",
     'torch.randint(documents, (documents,), generator=generator, dtype=torch.int64, device="cpu")',
     'torch.randperm(documents, generator=generator, device="cpu")'),
    ("mean of ratios", "torch.stack([numerators, denominators], -1)",
     "torch.stack([numerators / denominators, torch.ones_like(denominators)], -1)"),
    ("always the same draws", "manual_seed(seed)", "manual_seed(0)"),
    ("interval of one document", "if self._documents < 2 or", "if"),
    ("draws without a value", " or not found.isfinite().all()", ""),
]  # fmt: skip

CONTROLS = [
    ("texts exchanged", "texts = (train_tokens, held_out)", "texts = (held_out, train_tokens)"),
    ("PCA fitted on what it is judged on", "fit_pca(train)", "fit_pca(rows)"),
    ("pairs of the judged text", "pair_table_fvu(train, train_pairs, rows, pairs)",
     "pair_table_fvu(rows, pairs, rows, pairs)"),
    ("linear map fitted on what it is judged on", "linear_fvu(train_inputs, train, inputs, rows)",
     "linear_fvu(inputs, rows, inputs, rows)"),
    ("random directions of the judged text", "random_dictionary_fvu(train, rows,", "random_dictionary_fvu(rows, rows,"),
    ("rank cut off", "pca.fidelity(rows, round(l0))", "pca.fidelity(rows, int(l0))"),
    ("outliers of the site that is read", "tokens.where(writes,", "tokens.where(reads,"),
    ("outliers by the median", "moments.max_norm)", "moments.median_norm)"),
    ("tokens of the fit", '"control_tokens": len(rows)', '"control_tokens": len(train)'),
    ("inliers judged as text where outliers are in the fit alone", "all(mask.all() for mask in kept)", "kept[1].all()"),
]  # fmt: skip

FIGURES = [
    ("blocks not added", "total[name] + values if name in total else values", "values"),
    ("document of two blocks", "total[name].index_add_(0, place, values)", "total[name].index_copy_(0, place, values)"),
    ("frequency among special tokens too", '[:, 0, TERMS.index("tokens")].sum()',
     '[:, 2, TERMS.index("tokens")].sum()'),
    ("frequency in fp32", ".double() / tokens.double()", ".float() / tokens.float()"),
    ("losses of one set", '[f"{name}/losses"][:, index], self', '[f"{name}/losses"][:, 0], self'),
    ("ablation of one set", "self.ablation(site, kind, index) for", "self.ablation(site, kind) for"),
    ("γ by the variance", "norm / math.sqrt(variance)", "norm / variance"),
    ("spread of one set", '_ratio(terms[TERMS.index("spread")], terms',
     '_ratio(self._sums[f"{name}/tokens"][:, 0].sum(0)[TERMS.index("spread")], terms'),
    ("FVU about zero", '_ratio(total["error"], total["spread"])', '_ratio(total["error"], total["about_zero"])'),
    ("explained variance of sums twice", '_ratio(total["explained"], n)', "1 - fvu"),
    ("γ turned over", '_ratio(total["square"], total["product"])', '_ratio(total["product"], total["square"])'),
    ("L0 of documents", 'self._bootstrap.ratio(terms["l0"], terms["tokens"])',
     'self._bootstrap.ratio(terms["l0"] / terms["tokens"], torch.ones_like(terms["tokens"]))'),
    ("interval of a loss, not of its rise", "self._bootstrap.ratio(losses[:, 0] - clean[:, 1],",
     "self._bootstrap.ratio(losses[:, 0],"),
    ("KL of the losses", 'LOSSES.index("divergence")', 'LOSSES.index("loss")'),
    ("zero ablation by the mean", 'loss_recovered(delta, ablated["zero"])', 'loss_recovered(delta, ablated["mean"])'),
    ("share of the inliers", "{term: 1 - _ratio(", "{term: _ratio("),
    ("a tenth is above a tenth", "(frequency > HIGH_FREQUENCY)", "(frequency >= HIGH_FREQUENCY)"),
    ("nearest bin", ".floor().long() - LOWEST", ".round().long() - LOWEST"),
    ("bin beyond 1", "exponents.clamp(0, bins - 1)", "exponents.clamp(0, bins)"),
    ("nothing by nothing is 0", "if denominator != 0 else math.nan", "if denominator != 0 else 0.0"),
    ("infinity as a number", "and not math.isfinite(value)", "and math.isnan(value)"),
]  # fmt: skip

TOKEN_SETS = [
    ("what is predicted at BOS", "self.is_text[:, :-1] & self.is_text[:, 1:]", "self.is_text[:, 1:]"),
    ("special tokens of no document", "following = here.flip(1).cummin(1).values.flip(1)", "following = here"),
    ("BOS is text", "(owners >= 0) & ~isin(tokens, special_token_ids(model))", "owners >= 0"),
    ("special tokens among the inliers", "self.is_text & inlier,", "inlier & (self.documents >= 0),"),
    ("a token of just that norm", "norms > max_norm", "norms >= max_norm"),
    ("NaN taken for an outlier", "~(norms > max_norm)", "(norms <= max_norm)"),
    ("padding in every", '"every": self.documents >= 0', '"every": torch.ones_like(self.is_text)'),
    ("owners of padding", "torch.where(present, owners, -1)", "owners"),
]  # fmt: skip

SITE_MOMENTS = [
    ("mean norm", ".median().item() for", ".mean().item() for"),
    ("median with BOS", "stream(model, train_tokens, sites, batch_size=batch, device=device)",
     "stream(model, train_tokens, sites, batch_size=batch, skip_token_ids=(), device=device)"),
    ("median of the last batch", "norms[site].append(norms_of(x).double())", "norms[site] = [norms_of(x).double()]"),
    ("tokens of the first batch", "slice(start, start + batch)", "slice(0, batch)"),
    ("sums of the last batch", "sums[site][index] += ", "sums[site][index] = "),
    ("one mean for all sets", "wide[masks[name]]", 'wide[masks["text"]]'),
    ("mean about the shift", "shift + sums[index] / counts[name]", "sums[index] / counts[name]"),
    ("inliers are those below the median", "part.masks(x, outlier_ratio * medians[site])",
     "part.masks(x, medians[site])"),
]  # fmt: skip

PROTOCOL_MUTANTS = [
    ("prediction of the document before", "text.documents[:, 1:][self.scored]", "text.documents[:, :-1][self.scored]"),
    ("loss of the token itself", "text.tokens[:, 1:][self.scored]", "text.tokens[:, :-1][self.scored]"),
    ("fires at special tokens", 'self.masks["text"][present]', 'self.masks["every"][present]'),
    ("spliced in everywhere", "attach(self.model, {site: _Fixed(value)}, (), positions=mask)",
     "attach(self.model, {site: _Fixed(value)}, ())"),
    ("one mean ablates all sets", "self.moments.means)", 'dict.fromkeys(self.sets, self.moments.means["text"]))'),
    ("spread about one mean", "self.moments.means[name].to", 'self.moments.means["text"].to'),
    ("mean of another set where a batch has no outliers", " and torch.equal(values[each], values[other])", ""),
    ("losses of another set", "if torch.equal(self.masks[each], self.masks[other]) and torch", "if torch"),
    ("judged on what it reads", "given = self.batch.activations[subject.reads]",
     "given = self.batch.activations[subject.writes]"),
    ("cosine of nothing", "(norms * x_norms).clamp(min=tiny)", "(norms * x_norms)"),
    ("nothing by nothing explained", "torch.where(each.error == 0, each.error, each.error / each.spread)",
     "each.error / each.spread"),
    ("norm ratio turned over", "norms / x_norms.clamp(min=tiny)", "x_norms / norms.clamp(min=tiny)"),
    ("tokens outside the set", "torch.where(member, stacked, torch.zeros_like(stacked))", "stacked"),
    ("ablated without being asked", "if site in ablated:", "if True:"),
    ("skip connection forgotten", "self.sae.decode(f, x) if isinstance(self.sae, Transcoder) else self.sae.decode(f)",
     "self.sae.decode(f)"),
]  # fmt: skip

LANGUAGE = [
    ("KL the other way round", "(expected.exp() * (expected - log_q))", "(log_q.exp() * (log_q - expected))"),
    ("softmax in the model's precision", "torch.log_softmax(flat[index[part]].to(wide), -1)",
     "torch.log_softmax(flat[index[part]], -1)"),
    ("padding scored", "given.counted(tokens, attention_mask)", "given.counted(tokens, None)"),
    ("padding read", "else attention_mask[batch]", "else None"),
    ("scored at BOS", "counted[:, :-1] & counted[:, 1:]", "counted[:, 1:]"),
    ("positions of the first batch", "with during(batch):", "with during(slice(0, batch_size)):"),
    ("predictions at padding counted", "n_predictions(model, tokens, skipped, attention_mask)",
     "n_predictions(model, tokens, skipped)"),
    ("nothing lost by ablation", "or ablation_delta <= 0:", "or ablation_delta == 0:"),
    ("a norm of just the bound spared", "torch.where(norms > self.max_norm, x",
     "torch.where(norms >= self.max_norm, x"),
    ("clean loss left in", "batch_size, attention_mask) - clean_loss\n    predictions",
     "batch_size, attention_mask)\n    predictions"),
]  # fmt: skip

# ---- probing

FEATURES = [
    ("deviation of all rows", "both = self.x[positive | negative].double()", "both = self.x.double()"),
    ("coordinates in their own units", "(means[0] - means[1]).abs() / deviation, 0.0)",
     "(means[0] - means[1]).abs(), 0.0)"),
    ("dense: larger in the class alone", "(means[0] - means[1]).abs() / deviation",
     "(means[0] - means[1]) / deviation"),
    ("latents: larger in the class alone", "return (means[0] - means[1]).abs()", "return means[0] - means[1]"),
    ("mean where it fires", "self.values[kept]) / mask.sum())", "self.values[kept]) / kept.sum())"),
    ("document's mean where it fires", "torch.bincount(owners, minlength=documents)[rows]",
     "torch.bincount(owners[self.rows], minlength=documents)[rows]"),
    ("document without rows", ".clamp(min=1)[:, None]", "[:, None]"),
    ("rows kept are one off", "kept.cumsum(0) - 1, kept", "kept.cumsum(0), kept"),
]  # fmt: skip

K_SPARSE = [
    ("columns by all rows", "features.differences(split.train & labels, split.train & ~labels)",
     "features.differences(labels, ~labels)"),
    ("bottom k", "difference.sort(descending=True, stable=True)", "difference.sort(descending=False, stable=True)"),
    ("probe fitted on all rows", "fit_logistic(x[split.train], labels[split.train], l2)",
     "fit_logistic(x, labels, l2)"),
    ("judged on the training rows", "(probe.scores(x[split.judged]), labels[split.judged], owners[split.judged])",
     "(probe.scores(x[split.train]), labels[split.train], owners[split.train])"),
    ("columns of the first split", "ranked[number][:k] if", "ranked[0][:k] if"),
    ("rows halved, not documents", "in_train[owners]\n    split",
     "(torch.rand(len(owners), generator=generator) < 0.5)\n    split"),
    ("judged with what is trained on", "Split(train, task.known & ~in_train[owners])", "Split(train, task.known)"),
    ("documents that are not known", "positive[owners[task.known & task.labels]]", "positive[owners[task.labels]]"),
    ("odd ones never trained on", "(len(shuffled) + (not odd)) // 2", "len(shuffled) // 2"),
    ("the same half always", "manual_seed(seed)\n    n =", "manual_seed(0)\n    n ="),
    ("fewest tokens off by one", "int(mask.sum()) < (FEWEST", "int(mask.sum()) <= (FEWEST"),
    ("fewest documents off by one", "< FEWEST_DOCUMENTS:", "<= FEWEST_DOCUMENTS:"),
    ("interval of the first split", "part[i].mean(0)", "part[i][0]"),
    ("interval over splits", "part[i].mean(0)", "part[i].flatten()"),
    ("interval over rows, not documents", "None if times is None else times[:, owners]",
     "None if times is None else times[:, torch.arange(len(owners)) % times.shape[1]]"),
    ("threshold at the median", "balanced_accuracy(scores > 0,", "balanced_accuracy(scores > scores.median(),"),
    ("random directions of the mean", "copy_(-(mean @ sae.W_enc))", "copy_(mean @ sae.W_enc)"),
    ("random directions fire too seldom", "round(l0 * len(rows))", "int(l0) * len(rows)"),
]  # fmt: skip

LABELS = [
    ("follows another row", "ends[:-1] & ~first[1:]", "ends[:-1]"),
    ("number in capitals", "len(word) > 1 and word.isalpha() and word.isupper()", "len(word) > 1 and word.isupper()"),
    ("a letter in capitals", "len(word) > 1 and", "len(word) > 0 and"),
    ("source of one document", "if count > 1]", "if count > 0]"),
    ("any number of sources", "if count > 1][:MOST_SOURCES]", "if count > 1]"),
    ("prose and program", "code != prose for", "code or prose for"),
    ("compressed files", 'part.removesuffix(".gz")', "part"),
    ("the opposite asked again", "differs.any() and not differs.all()", "differs.any()"),
    ("fewest letters off by one", "letters.total() < FEWEST_LETTERS", "letters.total() <= FEWEST_LETTERS"),
    ("kinds of letters", "[0].lower()] += count", "[0].lower()] += 1"),
    ("two labels asked twice", "kinds[1:] if len(kinds) == 2 else kinds", "kinds"),
]  # fmt: skip

PROBES = [
    ("sample deviation", "deviation = (x - mean).square().mean(0).sqrt()", "deviation = x.std(0)"),
    ("bias penalised", "    penalty[-1] = 0  # the bias is free\n", ""),
    ("classes by their size", "x.new_tensor(n / (2 * positive)), x", "x.new_tensor(1.0), x"),
    ("rows not centred when judged", "((x.double() - self.mean) / self.deviation)", "(x.double() / self.deviation)"),
    ("plain accuracy", "((weights @ right) / (weights @ of_all)).mean(1)",
     "(weights @ right).sum(1) / (weights @ of_all).sum(1)"),
    ("a tie is a win", "negative.cumsum(1) - negative / 2", "negative.cumsum(1)"),
    ("a tie is lost", "negative.cumsum(1) - negative / 2", "negative.cumsum(1) - negative"),
    ("area of all pairs", "(positive.sum(1) * negative.sum(1))", "((positive + negative).sum(1) ** 2 / 2)"),
    ("draws of one class", "weights[:, mask])", "weights[:, : int(mask.sum())])"),
]  # fmt: skip

# ---- studies

UNIFORMITY = [
    ("bits for nats", "-p * p.log())", "-p * p.log2())"),
    ("effects cancel", "effects.double().abs()", "effects.double()"),
    ("latents without effect not counted", "torch.bincount(tokens, minlength=n)",
     "torch.bincount(tokens[effects != 0], minlength=n)"),
    ("logit of the token itself", "text.tokens[rows, column + 1]", "text.tokens[rows, column]"),
    ("logit not about the mean", "[:, 0] - own.mean(1)).sum()", "[:, 0]).sum()"),
    ("control of unit norms", "random *= (chosen.norm(dim=1) / random.norm(dim=1))[:, None]",
     "random /= random.norm(dim=1, keepdim=True)"),
    ("control without activations", "values * (random * g[token]).sum(1)", "(random * g[token]).sum(1)"),
    ("tokens that do not count", "torch.where(scored.cpu(), order, torch.inf)", "order"),
    ("the tokens drawn of SAEs without effect", "torch.where((r + by_chance).isfinite()[:, None], found,",
     "torch.where(l0.isfinite()[:, None], found.nan_to_num(0),"),
    ("SAE without activations", "values * (chosen * g[token]).sum(1)", "(chosen * g[token]).sum(1)"),
    ("places of the rows drawn", "each[rows.to(each.device), column.to(each.device)] for",
     "each[: len(rows)][torch.arange(len(rows)), column.to(each.device)] for"),
]  # fmt: skip

POSITION = [
    ("twice as wide beyond the first octave", "EVERY // OF_OCTAVE * 2**octave",
     "EVERY // OF_OCTAVE * 2 ** (octave + 1)"),
    ("documents in a row in a group", "text.documents.clamp(min=0)) % groups", "text.documents.clamp(min=0)) * 0"),
    ("first position of a bin", 'positions, "mean", include_self', 'positions, "amin", include_self'),
    ("mean square of all", '["about_zero"].sum() / of_sae.terms["tokens"].sum()', '["about_zero"].sum()'),
    ("losses by tokens", "x, rise, predictions, DELTA_LOSS", "x, rise, tokens, DELTA_LOSS"),
    ("interval of the control", '"SAE", drawn.ratios(error, tokens))', '"SAE", drawn.ratios(spread, tokens))'),
    ("mean of bins", 'each[0] += row["y"] * row["n"]\n                each[1] += row["n"]',
     'each[0] += row["y"]\n                each[1] += 1'),
    ("first half at the end", 'else row["x"] >= last', 'else row["x"] < last'),
]  # fmt: skip

BF16 = [
    ("shift the other way", "found[name].delta_loss - found[FP32].delta_loss",
     "found[FP32].delta_loss - found[name].delta_loss"),
    ("interval of a rise, not of the shift", "drawn.ratio(shifted,", "drawn.ratio(found[name].rise,"),
    ("SAE left in fp32", '/sae", on="float32", sae_dtype=torch.bfloat16',
     '/sae", on="float32", sae_dtype=torch.float32'),
    ("model left in fp32", '/both", on="bfloat16"', '/both", on="float32"'),
    ("whole interval", '(row["high"] - row["low"]) / 2', '(row["high"] - row["low"])'),
    ("signed shifts", "max((abs(each[key]) for", "max((each[key] for"),
]  # fmt: skip

FREQUENCY = [
    ("nearest bin", "(exponents * BINS).floor()", "(exponents * BINS).round()"),
    ("lower end for the middle", "first + index + 0.5", "first + index"),
    ("frequency 1 in a bin of its own", ".clamp(LOWEST * BINS, -1)", ".clamp(LOWEST * BINS, 0)"),
    ("a tenth is above a tenth", "frequency > HIGH_FREQUENCY", "frequency >= HIGH_FREQUENCY"),
    ("if latents that fire fired alike", "alike = math.log10(l0 / sae.width)",
     "alike = math.log10(l0 / int(fires.sum()))"),
    ("share of those that fire", '["never"] / sae.width', '["never"] / (sae.width - facts[sae.name]["never"])'),
]  # fmt: skip

SPARSITY = [
    ("SAEs above PCA", 'each["fvu"] < each["pca_fvu"] for', 'each["fvu"] > each["pca_fvu"] for'),
    ("FVU's interval at the loss", 'interval=figures["delta_loss_interval"]', 'interval=figures["fvu_interval"]'),
    ("controls on all tokens", 'of_fvu | {"n": figures["control_tokens"]}', "of_fvu"),
    ("controls exchanged", '"pca_fvu": PCA, "random_fvu": RANDOM', '"pca_fvu": RANDOM, "random_fvu": PCA'),
    ("the SAE's loss for that of the mean", 'y=figures["ablation_delta_loss"], series=MEAN', "y=loss, series=MEAN"),
]  # fmt: skip

SUBSETS = [
    ("smallest sources", "(-size[source], source)", "(size[source], source)"),
    ("one source too many", "ordered[: most - 1]}", "ordered[:most]}"),
    ("intervals of all documents", "work.bootstrap(int(mask.sum()))", "work.bootstrap(len(mask))"),
    ("most for least", "key=lambda source: mean(source, DELTA_LOSS))", "key=lambda source: -mean(source, DELTA_LOSS))"),
    ("sources by FVU", "key=lambda source: mean(source, DELTA_LOSS))", "key=lambda source: mean(source, FVU))"),
]  # fmt: skip

TRANSFER = [
    ("second model's figures as its own", '"second": work.sums(f"{NAME}/second", text, on="second")',
     '"second": work.sums(f"{NAME}/second", text)'),
    ("roles exchanged", "whole.where(role == index)", "whole.where(role == len(spoken.names) - 1 - index)"),
    ("what is nobody's counts", "roles = len(spoken.names) + 1", "roles = len(spoken.names)"),
    ("own figures in the sentence", 'losses = f"ΔLM loss {of(second, DELTA_LOSS)}',
     'losses = f"ΔLM loss {of(own, DELTA_LOSS)}'),
]  # fmt: skip

LADDER = [
    ("linear in L0", "math.log(l0 / x0) / math.log(x1 / x0)", "(l0 - x0) / (x1 - x0)"),
    ("arithmetic middle", "math.sqrt(low * high)", "(low + high) / 2"),
    ("L0 that some curve spans", "low, high = max(points[0][0] for", "low, high = min(points[0][0] for"),
    ("kinds in one ladder", "(sae.site, sae.layer, sae.kind), []", '(sae.site, sae.layer, ""), []'),
    ("losses in the place of FVU", 'interpolated(curve(width, "delta_loss"), l0)',
     'interpolated(curve(width, "fvu"), l0)'),
    ("points of all widths", "for sae in group if sae.width == width]", "for sae in group]"),
]  # fmt: skip

COMMON = [
    ("rise without the clean loss", '[f"{sae.name}/losses"][:, 0, loss] - clean[:, 1]',
     '[f"{sae.name}/losses"][:, 0, loss]'),
    ("zero for the mean", 'sums[f"{sae.writes}/mean"]', 'sums[f"{sae.writes}/zero"]'),
    ("losses by tokens", "ratio(self.rise, self.predictions)\n\n    @property\n    def ablation",
     'ratio(self.rise, self.terms["tokens"])\n\n    @property\n    def ablation'),
    ("nothing by nothing is 0", "if below != 0 else math.nan", "if below != 0 else 0.0"),
    ("predictions of all owners", "self.predictions[owners]", "self.predictions * owners.any()"),
    ("ends exchanged", "low, high = (None, None) if interval is None else interval",
     "high, low = (None, None) if interval is None else interval"),
]  # fmt: skip

# ---- ravel

ANSWERS = [
    ("2 is too far", "<= _WITHIN", "< _WITHIN"),
    ("label cut off", " or part.startswith(said) for", " for"),
    ("empty text is all labels", "return bool(said) and any(", "return any("),
    ("first part alone", 'label.split(",")) if part', 'label.split(",")[:1]) if part'),
    ("behind the quote", "text.partition('\"')[0]", "text.partition('\"')[2] or text"),
    ("minus lost", 'r"-?\\d+"', 'r"\\d+"'),
]  # fmt: skip

CONTINUATION = [
    ("beginning with the entity in it", "while start < most and", "while start <= most and"),
    ("cap forgotten", "return logits if self._cap is None else", "return logits if True else"),
    ("the layer itself again", "self.stack.layers[: site.layer + 1], stream",
     "self.stack.layers[: site.layer], stream"),
    ("end of the longest", "len(prompt.ids) - 1 - template.start for", "longest - 1 for"),
    ("position in the whole prompt", "prompt.position - template.start for", "min(prompt.position, longest - 1) for"),
    ("MLP's output for the stream", 'if site.kind == "resid" else at + (new - streams.vectors).to(at.dtype)',
     "if True else at"),
    ("change of the MLP twice", "at + (new - streams.vectors).to(at.dtype)", "at + new.to(at.dtype)"),
    ("stream in the place of the MLP's output", 'stream if site.kind == "resid" else found["mlp", site.layer]',
     "stream"),
    ("generated without the exchange", "with self._replacing(site, positions, new):",
     "with self._replacing(None, positions, new):"),
    ("said at the same place", "            ends = ends + 1\n            ids[rows, ends] = found[-1]",
     "            ids[rows, ends + 1] = found[-1]"),
]  # fmt: skip

RAVEL_FEATURES = [
    ("base and source exchanged", "difference = self.x[source] - self.x[base]",
     "difference = self.x[base] - self.x[source]"),
    ("all directions", "(difference @ self.rows.T * mask) @ self.rows", "(difference @ self.rows.T) @ self.rows"),
    ("PCA of the test too", "fit_pca(activations[fitted_on].float())", "fit_pca(activations.float())"),
    ("directions drawn anew", "manual_seed(seed)\n    gaussian", "manual_seed(0)\n    gaussian"),
    ("signs of the diagonal", "Q * torch.sign(R.diagonal())", "Q"),
    ("error kept where it is dropped", "        if drop_error:\n            parts",
     "        if not drop_error:\n            parts"),
    ("signs exchanged", "torch.where(rows % 2 == 0, -1.0, 1.0)", "torch.where(rows % 2 == 0, 1.0, -1.0)"),
    ("latents of the source alone", "torch.where(rows % 2 == 0, -1.0, 1.0)", "torch.where(rows % 2 == 0, 0.0, 1.0)"),
    ("scale of the input", "return W * sae.input_scale, sae", "return W, sae"),
    ("bias of a decoder", "return found + self.start", "return found"),
    ("mask of what stays", "self.sae.decode((1 - mask) * self.f[base] + mask * self.f[source])",
     "self.sae.decode(mask * self.f[base] + (1 - mask) * self.f[source])"),
    ("error of the base twice", "self.x[base] + mixed - self.sae.decode(self.f[base])",
     "self.x[base] + mixed - self.sae.decode(self.f[source])"),
]  # fmt: skip

KNOWLEDGE = [
    ("prompts that it does not know", "        if is_known and is_usable and each.prompt.entity in entities",
     "        if is_usable and each.prompt.entity in entities"),
    ("any for every", 'any if protocol.known == "any" else all', 'all if protocol.known == "any" else any'),
    ("entities of one attribute", "all(attribute in of_entity and enough(", "any(attribute in of_entity and enough("),
    ("worst known", "(-count[entity], kept.index(entity))", "(count[entity], kept.index(entity))"),
    ("labels of several tokens", 'protocol.labels == "first" or each.answer.tokens == 1', "True"),
    ("share of all prompts", "round(sum(of) / len(of), 4)", "round(sum(of) / len(asked), 4)"),
    ("answers in the order of templates",
     "for index, answer in zip(rows, said, strict=True):\n                found[index]",
     "for index, answer in zip(rows, said, strict=True):\n                found[start + rows.index(index)]"),
    ("rows of the first batch", "zip(*parts[site], strict=True)",
     "zip(*[parts[site][0]] * len(parts[site]), strict=True)"),
]  # fmt: skip

METHODS = [
    ("PCA of all prompts", "_prompts(pairs.train, x))", "on.activations.prompts)"),
    ("PCA of bases alone", "for each in (pair.base, pair.source)}", "for each in (pair.base,)}"),
    ("mean over prompts taken out", "x - x.mean(1, keepdim=True)", "x - x.mean(0, keepdim=True)"),
    ("LayerNorm's mean left in", "return x if on.model.stack.is_gemma else", "return x if True else"),
    ("variance about zero", "(wide - wide.mean(0)).square().sum().item()", "wide.square().sum().item()"),
    ("prompts that are no part", "_given(on)[on.activations.prompts]", "_given(on)"),
    ("error of the SAE kept", 'protocol.error == "drop"', 'protocol.error != "drop"'),
]  # fmt: skip

PAIRS = [
    ("label of the base", "caused = replace(own, label=label, token=token)", "caused = own"),
    ("source's answer to another question", "label = self.data.labels[attribute][s]",
     "label = self.data.labels[self.attribute][s]"),
    ("floors exchanged", '"always base": torch.tensor([pair.base_token == pair.token',
     '"always base": torch.tensor([pair.source_token == pair.token'),
    ("training's entities in the test", 'drawing.pairs(part("test", "train"), protocol.test_pairs)}',
     'drawing.pairs(part("train", "train"), protocol.test_pairs)}'),
    ("pairs of the training in the test", "order[len(order) - test :]", "order[:test]"),
    ("equal labels in cause", 'or (is_cause and self.protocol.equal == "isolation")', ""),
    ("a city with itself", 'if b.prompt.entity == s and self.protocol.equal != "all":', "if False:"),
    ("clashes kept", 'return caused if self.protocol.clashes == "keep" else replace(caused, is_cause=False)',
     "return caused"),
    ("sources of the other attribute", "found += self._drawn(of_attribute[other], sources, share)",
     "found += self._drawn(of_attribute[other], of_attribute[other], share)"),
    ("isolation of each attribute as many as cause", "(count + number) // len(others)", "count"),
    ("the same pairs for all seeds", 'random.Random(f"{seed} {attribute}")', "random.Random(attribute)"),
    ("fewest off by one", ") < LEAST:", ") <= LEAST:"),
    ("a clash in isolation", 'return own if not clashes or self.protocol.clashes != "drop" else self._drop()',
     "return own"),
]  # fmt: skip

PRESETS = [
    ("end never reached", "step / max(1, steps - 1)", "step / max(1, steps)"),
]  # fmt: skip

PROMPTS = [
    ("token after the entity", "Tokens(whole, len(part) - 1)", "Tokens(whole, len(part))"),
    ("last token of the label", "Answer(label, behind[0], len(behind))", "Answer(label, behind[-1], len(behind))"),
    ("no space before the label", "prompts[0].text + before_label(template) + label", "prompts[0].text + label"),
    ("BOS forgotten", "[(*self._before, *map(int, ids)) for ids in found]", "[tuple(map(int, ids)) for ids in found]"),
    ("BOS is of the entity", "else len(self._before)\n", "else 0\n"),
]  # fmt: skip

SCORE = [
    ("isolation over pairs", "torch.stack(list(of_part.values())).mean(0)", "list(of_part.values())[0]"),
    ("attributes of isolation by size", 'f"isolation {asked[pair.base].prompt.attribute}"', '"isolation"'),
    ("entities of sources", "asked[pairs[place].base].prompt.entity for",
     "asked[pairs[place].source].prompt.entity for"),
    ("interval over pairs", "sums[1] = torch.bincount(numbers, minlength=len(self._number)).double()",
     "sums[1] = len(numbers) / len(self._number)"),
    ("value among the draws", "self._bootstrap.interval(values[1:])",
     "self._bootstrap.interval(values.mean()[None].expand(2))"),
    ("order of templates taken for that of pairs", "zip(order.tolist(), logits.argmax(1).tolist(), strict=True)",
     "enumerate(logits.argmax(1).tolist())"),
    ("places of the first batch", "found[start + place] = ", "found[place] = "),
    ("disentangle by the better", "(cause + isolation) / 2}", "torch.maximum(cause, isolation)}"),
]  # fmt: skip

# ---- dashboards

DASHBOARD_LOGITS = [
    ("gain without 1", "self._gain = 1 + ", "self._gain = 0 + "),
    ("gain forgotten", "stream.to(device) * self._gain.to(device)", "stream.to(device)"),
    ("W_O turned over, its gain forgotten", "@ weight.T) * gain", "@ weight.T)"),
    ("suppressed from the top", "smallest.add(logits.neg_(), first)", "smallest.add(logits, first)"),
    ("sign of what is suppressed", "suppressed, -lowered)", "suppressed, lowered)"),
    ("tokens of the first block", "largest.add(logits, first)", "largest.add(logits, 0)"),
]  # fmt: skip

NEIGHBOURS = [
    ("dot products", "unit / unit.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)", "unit"),
    ("itself", "            block[inside.nonzero().squeeze(1), own[inside]] = -torch.inf\n", ""),
    ("a row of zeros", ".clamp(min=torch.finfo(torch.float64).tiny)", ""),
]  # fmt: skip

DASHBOARD_COLLECT = [
    ("cells that are not of the row", "cell = position // self.sizes.window", "cell = self.token // self.sizes.window"),
    ("last of equals", "first[1:] = of[1:] != of[:-1]", "first[:-1] = of[1:] != of[:-1]"),
    ("sample of each batch", "shuffled(row + first_row, position, self.seed)", "shuffled(row, position, self.seed)"),
    ("next row forgotten when gone on with", 'self.n_tokens, self._next_row = tensors["progress"].tolist()',
     'self._next_row = tensors["progress"].tolist()[1]'),
    ("strata forgotten when gone on with", '            "cells": self.strata.cells,\n', ""),
]  # fmt: skip

FILES = {
    "evaluation/bootstrap.py": (BOOTSTRAP, ["tests/evaluation/test_bootstrap.py"]),
    "evaluation/controls.py": (CONTROLS, ["tests/evaluation/test_controls.py"]),
    "evaluation/figures.py": (FIGURES, [FIGURES_TESTS, PROTOCOL, "-k", "not any_gemma and not plain_hooks"]),
    "evaluation/token_sets.py": (
        TOKEN_SETS,
        [FIGURES_TESTS, PROTOCOL, STUDIES, "-k", "test_figures or (test_protocol and not any_gemma) or owners_in"],
    ),
    "evaluation/site_moments.py": (SITE_MOMENTS, [PROTOCOL, "-k", "not any_gemma"]),
    "evaluation/protocol.py": (
        PROTOCOL_MUTANTS,
        [PROTOCOL, STUDIES, "-k", "(test_protocol and not any_gemma) or position_by_hand"],
    ),
    "evaluation/language_model.py": (
        LANGUAGE,
        [LANGUAGE_MODEL, "tests/activations/test_padding.py", PROTOCOL, "-k", "Loss or Splic or padding or hooks"],
    ),
    "probing/features.py": (FEATURES, ["tests/probing"]),
    "probing/k_sparse.py": (K_SPARSE, ["tests/probing"]),
    "probing/labels.py": (LABELS, ["tests/probing"]),
    "probing/probes.py": (PROBES, ["tests/probing"]),
    "studies/uniformity.py": (UNIFORMITY, [STUDIES, "-k", "uniformity or drawn or one_pass"]),
    "studies/position.py": (POSITION, [STUDIES, "-k", "position"]),
    "studies/bf16.py": (BF16, [STUDIES, "-k", "bf16 or precision"]),
    "studies/frequency.py": (FREQUENCY, [STUDIES, "-k", "frequenc"]),
    "studies/sparsity_fidelity.py": (SPARSITY, [STUDIES, "-k", "sparsity"]),
    "studies/subsets.py": (SUBSETS, [STUDIES, "-k", "subset or sources"]),
    "studies/transfer.py": (TRANSFER, [STUDIES, "-k", "transfer or same_model"]),
    "studies/width_ladder.py": (LADDER, [STUDIES, "-k", "ladder"]),
    "studies/common.py": (COMMON, [STUDIES, "-k", "by_hand or add_up or csv"]),
    "ravel/answers.py": (ANSWERS, ["tests/ravel/test_answers.py"]),
    "ravel/continuation.py": (CONTINUATION, ["tests/ravel/test_continuation.py"]),
    "ravel/features.py": (RAVEL_FEATURES, ["tests/ravel/test_features.py"]),
    "ravel/knowledge.py": (
        KNOWLEDGE,
        ["tests/ravel/test_pairs.py", "tests/ravel/test_known.py", "-k", "knows or several_tokens"],
    ),
    "ravel/methods.py": (
        METHODS,
        ["tests/ravel/test_methods.py", "tests/ravel/test_known.py", "-k", "methods or variance or penalty"],
    ),
    "ravel/pairs.py": (PAIRS, ["tests/ravel/test_pairs.py"]),
    "ravel/presets.py": (PRESETS, ["tests/ravel/test_pairs.py", "-k", "presets"]),
    "ravel/prompts.py": (PROMPTS, ["tests/ravel/test_prompts.py"]),
    "ravel/score.py": (SCORE, ["tests/ravel/test_score.py", "tests/ravel/test_known.py", "-k", "score or judged_in"]),
    "dashboards/logits.py": (DASHBOARD_LOGITS, [WEIGHTS, "-k", "Lens"]),
    "dashboards/neighbours.py": (NEIGHBOURS, [WEIGHTS, "-k", "Nearest"]),
    "dashboards/collect.py": (DASHBOARD_COLLECT, [COLLECT]),
}
MUTANTS = [Mutant(name, file, old, new) for file, (mutants, _) in FILES.items() for name, old, new in mutants]
TESTS = {file: tests for file, (_, tests) in FILES.items()}
