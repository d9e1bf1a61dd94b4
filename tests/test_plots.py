"""The plots draw the data that they are given: their artists are read back."""

import dataclasses
import io
import math
import warnings
from typing import get_args

import federated_learning as fl
from harness.cli.fields import UserError
from harness.cli.flags import to_flag
from harness.cli.run_options import BY_CONTENT, MAY_GROW, Comparison, Run
from harness.reporting import (
    captions,
    client_plots,
    comparison_plots,
    drawing,
    figure_files,
    figure_form,
    plots,
)
from harness.training.records import RoundRecord
from variants import choices

import matplotlib.text
import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from reference import evaluation_of
from runs import caption_of_rows, configure

NOTE = "a data set · 2 clients · seed 0"


def record(round_num, train, test, own):
    rows = [
        {
            "client": k,
            "examples": 10,
            "loss": loss,
            "accuracy": accuracy,
            "finite": math.isfinite(loss),
        }
        for k, (loss, accuracy) in enumerate(own)
    ]
    sent = {"bytes_down": 2_000_000 * round_num, "bytes_up": 500_000}
    return RoundRecord(
        round_num,
        dict(zip(("loss", "accuracy"), train, strict=True)),
        *test,
        num_nonfinite=0,
        dropped=0,
        **sent,
        epsilon=None,
        seconds=1.0,
        clients=rows,
    )


RECORDS = [
    record(1, (2.0, 0.4), (1.5, 0.5), [(1.8, 0.3), (2.2, 0.5)]),
    record(2, (1.0, 0.7), (0.9, 0.75), [(0.5, 0.6), (math.nan, 0.1)]),
]


def caption_of(config, dataset):
    return captions.caption(fl.build_experiment(config, dataset))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_cost_draws_accuracy_against_all_bytes_so_far():
    figure = plots.plot_cost(RECORDS, NOTE)
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [2.5, 7.0]
    assert line.get_ydata().tolist() == [100 * record.test_accuracy for record in RECORDS]
    assert (
        "7.0 MB" in figure.get_suptitle()
        and "14 % of the bytes are uploads" in figure.get_supxlabel()
    )


@pytest.mark.parametrize(("panel", "quantity", "scale"), [(0, "loss", 1), (1, "accuracy", 100)])
def test_convergence_draws_the_records(panel, quantity, scale):
    figure = plots.plot_convergence(RECORDS, NOTE)
    axes = figure.axes[panel]
    train, test = axes.lines
    for line, name in ((train, "train"), (test, "test")):
        assert line.get_xdata().tolist() == [1, 2]
        assert line.get_ydata() == pytest.approx(
            [scale * r.figures()[f"{name}_{quantity}"] for r in RECORDS]
        )
    band = axes.collections[0].get_paths()[0].vertices
    own = [[scale * row[quantity] for row in r.clients if row["finite"]] for r in RECORDS]
    for round_num, values in enumerate(own, 1):
        drawn = band[band[:, 0] == round_num, 1]
        assert drawn.min() == pytest.approx(min(values)) and drawn.max() == pytest.approx(
            max(values)
        )
    assert axes.get_xlabel() == "round" and ("nats" if panel == 0 else "%") in axes.get_ylabel()
    assert "75.00% after round 2" in figure.get_suptitle()


def test_confusion_draws_counts_and_shades_errors():
    confusion = np.array([[9, 1, 0], [2, 6, 2], [0, 0, 1000]])
    figure = plots.plot_confusion(evaluation_of(confusion), NOTE)
    assert texts(figure) == ["9", "1", "·", "2", "6", "2", "·", "·", "1,000"]
    shade = np.asarray(figure.axes[0].images[0].get_array())
    # percent of the true label's images
    assert shade.tolist() == [
        [0, 10, 0],
        [20, 0, 20],
        [0, 0, 0],
    ]
    assert "5 of 1,020" in figure.get_suptitle()
    assert (
        figure.axes[0].get_xlabel() == "predicted label"
        and figure.axes[0].get_ylabel() == "true label"
    )


def test_confusion_of_many_labels_shows_those_with_most_errors():
    """Of 100 labels, label 7 is taken for 70, 8 for 80, and so on: 40 labels, 50 errors."""
    confusion = 5 * np.eye(100, dtype=int)
    confusion[7, 70] = 3
    for true in range(8, 28):
        confusion[true, 2 * true + 30] = 1
    figure = plots.plot_confusion(evaluation_of(confusion), NOTE)
    assert f"23 of {500 + 23}" in figure.get_suptitle()
    assert "the 40 of 100 labels with the most errors" in figure.get_supxlabel().replace("\n", " ")
    shade = np.asarray(figure.axes[0].images[0].get_array())
    assert shade.shape == (40, 40) and shade.max() == pytest.approx(100 * 3 / 8)


def test_colours_are_shown_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3)).astype(np.uint8)
    figure = plots.plot_misclassified(images, np.array([0, 1]), np.array([0, 0]), NOTE)
    (image,) = figure.axes[0].images
    assert np.array_equal(image.get_array(), images[1])


def test_partition_draws_counts_with_few_clients_and_a_map_with_many():
    counts = np.arange(20).reshape(2, 10)
    figure = plots.plot_partition(counts, NOTE)
    assert texts(figure) == ["·", *map(str, range(1, 20))]
    assert "2 clients of 45 to 145 images" in figure.get_suptitle()
    # (145 - 45) / (2 * 190)
    assert "Gini coefficient of the sizes 0.26" in figure.get_supxlabel().replace("\n", " ")
    many = plots.plot_partition(np.ones((500, 10), int), NOTE)
    assert texts(many) == [] and many.axes[0].images[0].get_array().shape == (500, 10)


def test_more_clients_than_a_figure_has_pixels_are_drawn_as_means():
    counts = np.arange(1001 * 2).reshape(1001, 2)
    (image,) = plots.plot_partition(counts, NOTE).axes[0].images
    assert image.get_array().shape == (334, 2)  # of three clients each, the last of two
    assert image.get_array()[0].tolist() == [2, 3] and image.get_array()[-1].tolist() == [
        1999,
        2000,
    ]
    assert image.get_extent() == [-0.5, 1.5, 1000.5, -0.5]
    assert image.colorbar.ax.get_ylabel() == "images, mean of 3 clients"


def test_the_axis_of_losses_says_what_clients_minimize():
    plain, own = (
        plots.plot_convergence(RECORDS, NOTE, own_loss=loss).axes[0].get_ylabel()
        for loss in ("", "label smoothing 0.1")
    )
    assert plain == "cross-entropy (nats)"
    assert own == "clients: label smoothing 0.1;\nglobal model: cross-entropy (nats)"


def test_misclassified_shows_the_wrong_ones_alone():
    labels = np.arange(10, dtype=np.uint8)
    images = np.zeros((10, 28, 28, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(10)
    predictions = labels.copy()
    predictions[[2, 7]] = [3, 1]
    figure = plots.plot_misclassified(images, labels, predictions, NOTE)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [
        "#2: a 2, predicted 3",
        "#7: a 7, predicted 1",
    ]
    assert [int(image.get_array()[0, 0]) for image in axes.images] == [2, 7]
    for image, text in zip(axes.images, axes.texts, strict=True):  # each below its text
        left, right, _, top = image.get_extent()
        assert left < text.get_position()[0] < right and text.get_position()[1] < top


def test_every_plot_says_what_it_was_made_on(digits):
    config = configure(dataset="digits", seed=7, alpha=0.25, clients_per_round=4)
    note = caption_of(config, digits)
    for said in (
        "scikit-learn digits (not MNIST)",
        "10 clients, 4 a round",
        "Dirichlet(0.25)",
        "fedavg",
        "seed 7",
    ):
        assert said in note
    assert "lr 0.05 ·" in note  # plain averaging has no rate of the server worth a word
    adaptive = caption_of(
        configure(algorithm="fedadam", client_optimizer="momentum", server_lr=0.05), digits
    )
    assert "fedadam, client momentum 0.9, lr 0.02, server lr 0.05 ·" in adaptive
    flags = {"num_clients": 10, "clients_per_round": 1, "byzantine": 1, "attack": "nan"}
    one = configure(**flags, partition="labels-per-client", labels_per_client=1)
    note = caption_of(one, digits)
    assert "· 10 clients, 1 a round · 1 label a client ·" in note and "· 1 attacker (nan) ·" in note
    figure = plots.plot_confusion(evaluation_of(np.eye(10, dtype=int)), note)
    assert figure.get_supxlabel().replace("\n", " ") == note


# field -> flags by which it changes the numbers, and must change the caption. A field that is not
# here is set by its own flag: see `flags_that_use`.
SAID = {
    "alpha": "--alpha 0.1",
    "attack": "--byzantine 2 --attack nan",
    "attack_scale": "--byzantine 2 --attack scaled --attack-scale 3",
    "batch_size": "--batch-size 8",
    "client_lr": "--client-lr 0.1",
    "client_momentum": "--client-optimizer momentum --client-momentum 0.5",
    "client_schedule": "--client-schedule inverse-sqrt",
    "delta": "--aggregator dp --delta 1e-4",
    "dropout": "--dropout 0.1",
    "dyn_alpha": "--algorithm feddyn --dyn-alpha 0.1",
    "labels_per_client": "--partition labels-per-client --labels-per-client 3",
    "local_epochs": "--local-epochs 2",
    "local_steps": "--local-steps 7",
    "client_weighting": "--client-weighting uniform",
    "drop_stragglers": "--stragglers 0.2 --drop-stragglers",
    "size_spread": "--partition lognormal-labels --size-spread 1",
    "backdoor_share": "--byzantine 2 --attack backdoor --backdoor-share 0.2",
    "backdoor_target": "--byzantine 2 --attack backdoor --backdoor-target 7",
    "unseen_clients": "--unseen-clients 0.2",
    "target_epsilon": "--aggregator dp --num-clients 100 --target-epsilon 8",
    "warmup_steps": "--client-schedule warm-up --warmup-steps 7",
    "lr_decay": "--client-schedule exponential --lr-decay 0.5",
    "lr_horizon": "--server-schedule cosine --lr-horizon 7",
    "min_images": "--min-images 20",
    "model": "--model 2nn",
    "noise": "--partition feature --noise 20",
    "noise_multiplier": "--aggregator dp --noise-multiplier 0.7",
    "num_clients": "--num-clients 5",
    "clients_per_round": "--clients-per-round 5",
    "prox_mu": "--algorithm fedprox --prox-mu 1",
    "server_epsilon": "--algorithm fedadam --server-epsilon 0.01",
    "public_cohorts": "--aggregator dp --public-cohorts",
    "rotation": "--partition feature --rotation 10",
    "sampling": "--sampling poisson",
    "seed": "--seed 3",
    "server_lr": "--server-lr 2",
    "server_momentum": "--algorithm fedavgm --server-momentum 0.5",
    "server_schedule": "--server-schedule inverse-sqrt",
    "shards_per_client": "--partition shards --shards-per-client 3",
    "size_exponent": "--partition quantity --size-exponent 2",
    "stragglers": "--stragglers 0.2",
    "tolerated": "--aggregator krum --tolerated 2",
    "trim": "--aggregator trimmed-mean --trim 0.2",
    "weight_decay": "--weight-decay 0.1",
    "class_weights": "--class-weights balanced",
    "device_speed": "--device-speed lognormal:0.5",
    "examples_per_second": "--device-speed constant --examples-per-second 10",
    "speed_by_size": "--device-speed lognormal:0.5 --speed-by-size 0.5",
    "bandwidth": "--bandwidth 1e6",
    "latency": "--latency 1",
    "deadline": "--latency 1 --deadline 2",
    "over_select": "--latency 1 --clients-per-round 5 --over-select 1.2",
    "buffer_size": "--algorithm fedbuff --latency 1 --buffer-size 2",
    "personal_layers": "--algorithm fedper --client-test 0.2 --model 2nn --personal-layers 2",
    "head_epochs": "--algorithm fedrep --client-test 0.2 --head-epochs 2",
    "ditto_lambda": "--algorithm ditto --client-test 0.2 --ditto-lambda 1",
    "apfl_alpha": "--algorithm apfl --client-test 0.2 --apfl-alpha 0.2",
    "fine_tune_epochs": "--client-test 0.2 --fine-tune-epochs 2",
}


def flags_that_use(field):
    """Flags by which a number that somebody added has an effect."""
    _, span, *_ = get_args(fl.Config.types()[field])
    default = fl.Config.defaults()[field]
    number = (span.low + span.high) / 2
    users = [
        f"{to_flag(by)} {name}"
        for by, table in choices.TABLES.items()
        for name, chosen in table.items()
        if field in chosen.fields
    ]
    value = type(default)(number if number != default else span.high)
    return f"{' '.join(users[:1])} {to_flag(field)} {value}"


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_caption_says_all_that_the_numbers_depend_on(digits, every):
    """Two runs that differ in one field have two captions; `make test` tries each fourth field,
    `make thorough` all."""
    elsewhere = {"dataset", "holdout"}  # in the data's own name
    by_name = {"algorithm", "aggregator", "partition", "client_optimizer", "byzantine", "loss"}
    bits = {"preset", "owner_choice"}  # what stands in the fields themselves, and last bits
    of_own_models = {"batch_norm"}  # see test_batch_norm.py
    changes_nothing = {*Run().to_dict(), *Comparison().to_dict(), *MAY_GROW, *BY_CONTENT}
    changing = fl.Config.defaults().keys() - changes_nothing - elsewhere - by_name - bits
    changing -= of_own_models
    assert SAID.keys() <= changing
    for field in sorted(changing)[::every]:
        flags = SAID.get(field) or flags_that_use(field)
        model = "" if "--model" in flags else "--model mlp"
        config = fl.parse(f"--dataset digits {model} {flags}")
        other = config.replace(**{field: fl.Config.defaults()[field]})
        assert config.to_dict()[field] != other.to_dict()[field], field
        assert caption_of(config, digits) != caption_of(other, digits), field


def test_a_caption_says_what_a_users_own_function_may_read(digits, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def same(parts, experiment): return parts\n")
    usual = f"--dataset digits --model mlp --algorithm {file}:same --aggregator {file}:same"
    assert "same, lr 0.05" in caption_of(fl.parse(usual), digits)
    caption = caption_of(
        fl.parse(f"{usual} --prox-mu 0.1 --server-epsilon 0.01 --trim 0.2"), digits
    )
    assert "same, server epsilon 0.01, prox mu 0.1, lr 0.05" in caption, caption
    assert "same, trim 0.2" in caption


def test_a_caption_says_each_row_that_is_compared(digits):
    caption = caption_of_rows(
        "--dataset digits --model mlp --compare fedavg,scaffold,fedprox --prox-mu 0.1", digits
    )
    named = (
        "algorithms compared: fedavg, lr 0.05; scaffold, lr 0.05; fedprox, prox mu 0.1, lr 0.05 ·"
    )
    assert named in caption and "· seed 0" in caption
    caption = caption_of_rows(
        "--dataset digits --compare nan,scaled --byzantine 3 --seeds 2", digits
    )
    named = "attacks compared: 3 attackers (nan); 3 attackers (scaled, scale 10) · seeds 0 to 1"
    assert named in caption
    caption = caption_of_rows(
        "--dataset digits --latency 1 --compare over_select=1,1.5 --clients-per-round 4", digits
    )
    assert "· over select compared: none; over-select 1.5 ·" in caption


def test_an_asynchronous_round_has_the_clients_that_report_first(digits):
    flags = {"dataset": "digits", "algorithm": "fedbuff", "buffer_size": 2, "latency": 1.0}
    config = configure(**flags, clients_per_round=5)
    assert "10 clients, 5 at work, 2 a round" in caption_of(config, digits)


@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_have_the_form_that_is_asked_for_and_say_what_made_them(kind, start):
    figure = plots.plot_convergence(RECORDS, NOTE)
    form = figure_form.FigureForm(kind, has_caption=False)
    content = figure_files.to_bytes(figure, form, {"command": "python x.py", "seconds": None})
    assert content.startswith(start) and b"command: python x.py" in content
    assert b"/Type3" not in content  # a font that journals refuse
    assert b"seconds" not in content and figure.get_supxlabel() == figure.get_suptitle() == ""
    assert form.file_name("convergence_plot.png") == f"convergence_plot.{kind}"


@figure_form.default_style
def test_a_png_is_what_savefig_writes():
    content = figure_files.to_bytes(plots.plot_convergence(RECORDS, NOTE))
    about = PIL.Image.open(io.BytesIO(content)).text["Description"]
    expected = io.BytesIO()
    metadata = {"Software": None, "Description": about}
    plots.plot_convergence(RECORDS, NOTE).savefig(expected, format="png", metadata=metadata)
    assert content == expected.getvalue()


def test_one_is_said_as_one():
    assert (
        captions.join_parts(["1 clients, 1 a round", "", "11 labels"])
        == "1 client, 1 a round · 11 labels"
    )
    assert captions.join_parts(["0.1 clients", "1,001 shards"]) == "0.1 clients · 1,001 shards"


def drawn_with(draw, **form):
    """The figure that is drawn in this form."""
    token = figure_form.FORM.set(figure_form.FigureForm(**form))
    try:
        return draw()
    finally:
        figure_form.FORM.reset(token)


@pytest.mark.parametrize("shape", [(16, 160), (28, 28), (96, 24), (256, 8)], ids=str)
@pytest.mark.parametrize("size", [None, (3.3, 2.2), (9, 3)], ids=str)
def test_no_text_is_on_a_misclassified_image(shape, size):
    images = np.zeros((18, *shape, 1), np.uint8)
    labels = np.zeros(18, int)
    figure = drawn_with(
        lambda: plots.plot_misclassified(images, labels, labels + 1, NOTE), size=size
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    texts = [text.get_window_extent(renderer) for text in axes.texts]
    shown = [image.get_window_extent(renderer) for image in axes.images]
    assert len(texts) == len(shown) == 18
    assert not any(text.overlaps(image.padded(-2)) for text in texts for image in shown)


def test_an_accuracy_below_zero_has_no_tick():
    records = [dataclasses.replace(r, extra_accuracies={"attack_success": 0.0}) for r in RECORDS]
    axes = plots.plot_convergence(records, NOTE).axes[1]
    assert axes.get_ylim()[0] < 0 <= min(axes.get_yticks())


def test_convergence_has_a_line_at_the_target():
    lines = plots.plot_convergence(RECORDS, NOTE, target=0.7).axes[1].lines
    (target,) = [line for line in lines if line.get_label() == "target, 70%"]
    assert set(target.get_ydata()) == {70}
    assert not any(
        "target" in line.get_label() for line in plots.plot_convergence(RECORDS, NOTE).axes[1].lines
    )


def test_eleven_rows_of_a_comparison_are_eleven():
    curves = {f"row {number}": np.full((1, 3), 0.5 + 0.01 * number) for number in range(11)}
    lines = comparison_plots.plot_comparison(curves, NOTE).axes[0].lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 11


def test_one_round_has_one_tick():
    for axes in plots.plot_convergence(RECORDS[:1], NOTE).axes:
        low, high = sorted(axes.get_xlim())
        shown = [tick for tick in axes.xaxis.get_ticklocs() if low <= tick <= high]
        assert shown == [1]


def test_the_range_of_clients_is_seen_in_a_single_round():
    """An area of no width is not: it is a bar then."""
    for records, width in ((RECORDS[:1], 6), (RECORDS[:2], 0)):
        for axes in plots.plot_convergence(records, NOTE).axes:
            (band,) = axes.collections
            assert band.get_linewidth() == [width]


def test_a_name_that_no_font_here_has_is_one_notice(capsys):
    """Of cuneiform, which stands for any script that is not installed."""
    name = "\U00012000 digits"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            figure_files.to_bytes(plots.plot_convergence(RECORDS, f"{name} \u00b7 seed 0"))
    assert capsys.readouterr().err.count("\n") <= 1
    assert drawing.fonts_for(["MNIST", "\u03b5 3"]) == FontProperties().get_family()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_classes_and_rows_are_in_the_fonts_for_them(monkeypatch):
    """Each kind of text has the second font, which here stands for one of another script."""
    own = FontProperties().get_family()
    fonts = [*own, "cmr10"]
    monkeypatch.setattr(drawing, "find_font", lambda lacking: ["cmr10"])
    classes = [f"\u732b{label}" for label in range(10)]
    confusion = plots.plot_confusion(evaluation_of(np.eye(10, dtype=int)), NOTE, classes)
    images = np.zeros((9, 4, 4, 1), np.uint8)
    labels = np.arange(9)
    curves = {name: np.full((1, 3), 0.5) for name in classes[:2]}
    rows = client_plots.plot_clients_of_rows({"\u732b": [np.full(3, 0.5)]}, "test_accuracy", NOTE)
    legend = comparison_plots.plot_comparison(curves, NOTE).legends[0]
    texts = [
        *confusion.axes[0].get_xticklabels(),
        *confusion.axes[0].get_yticklabels(),
        *rows.axes[0].get_yticklabels(),
        *legend.get_texts(),
        *plots.plot_misclassified(images, labels, labels + 1, NOTE, classes).axes[0].texts,
    ]
    assert len(texts) > 20
    assert [text.get_family() for text in texts] == [fonts] * len(texts)


def test_a_negative_loss_is_drawn():
    """On a linear scale, as a log scale has no place for it."""
    below = dataclasses.replace(RECORDS[1], train={"loss": -1.0, "accuracy": 0.7})
    scales = [
        plots.plot_convergence([RECORDS[0], last], NOTE, own_loss="own").axes[0].get_yscale()
        for last in (RECORDS[1], below)
    ]
    assert scales == ["log", "linear"]


def test_a_figure_says_how_many_seeds_its_rows_have():
    one = [np.array([0.5, 0.9])]
    needed = {"a": [2], "_b": [2, 2, 2]}
    figure = comparison_plots.plot_rounds_to_target({"a": one, "_b": 3 * one}, needed, 0.9, NOTE)
    assert figure.get_suptitle() == "Rounds to 90 % test accuracy, 1 to 3 seeds"
    perfect = {"a": [np.array([0.5, 1.0])]}  # an error of 0 is drawn at half of 50 %
    drawn = comparison_plots.plot_rounds_to_target(perfect, {"a": [2]}, 1.0, NOTE).axes[0].lines
    assert [line.get_ydata()[-1] for line in drawn] == pytest.approx([25, 25])
    names = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert [name.partition(":")[0] for name in names] == ["a", "_b", "target"]
    assert captions.join_parts(["1 local steps", "11 images"]) == "1 local step \u00b7 11 images"


def test_a_chinese_character_is_as_wide_as_two_letters():
    assert [drawing.shorten("\u732b" * number, 9) for number in (4, 5)] == [
        "\u732b" * 4,
        "\u732b" * 4 + "\u2026",
    ]
    assert drawing.shorten("a" * 9, 9) == "a" * 9 and drawing.shorten("a" * 10, 9)[8:] == "\u2026"
    assert drawing.are_words(["\u732b" * 3]) and not drawing.are_words(["\u732b" * 2, "1000"])


CURVES = {
    f"{name}, alpha {alpha}": [np.array([0.5, 0.8]), np.array([0.7, 0.9])]
    for name in ("fedavg", "scaffold")
    for alpha in (0.1, 1)
}
PANELS = {name: tuple(name.split(", ")) for name in CURVES}


def test_a_grid_has_a_panel_for_each_value_of_its_second_field():
    """A colour stands for the same algorithm in each; mean errors are 40 and 15 %."""
    measured = "clients' own test"
    figure = comparison_plots.plot_comparison(CURVES, "note", panels=PANELS, measured=measured)
    assert figure.axes[0].get_ylabel() == "clients' own test error (%)"
    assert [axes.get_title() for axes in figure.axes] == ["alpha 0.1", "alpha 1"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["fedavg", "scaffold"]
        assert [line.get_color() for line in axes.lines] == [*drawing.CYCLE[:2]]
        for line in axes.lines:
            assert line.get_ydata() == pytest.approx([40, 15])
    five = {
        f"x, {number}": curve
        for number, curve in zip(
            range(5), [*CURVES.values(), CURVES["fedavg, alpha 1"]], strict=True
        )
    }
    figure = comparison_plots.plot_comparison(
        five, "", panels={name: tuple(name.split(", ")) for name in five}
    )
    assert [axes.get_visible() for axes in figure.axes] == [*5 * [True], *3 * [False]]


@pytest.mark.parametrize(
    ("y", "ends", "scale"),
    [("error", 15, "log"), ("error-linear", 15, "linear"), ("accuracy", 85, "linear")],
)
def test_a_comparison_shows_what_is_asked_for(y, ends, scale):
    curves = {"one": CURVES["fedavg, alpha 1"]}
    figure = drawn_with(lambda: comparison_plots.plot_comparison(curves, "note"), y=y)
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(ends) and axes.get_yscale() == scale
    name = y.partition("-")[0]
    assert axes.get_ylabel() == f"test {name} (%)"
    assert figure.legends[0].get_title().get_text() == f"{name} after the last round"
    needed = {"one": [1.5, 1.2]}
    figure = drawn_with(
        lambda: comparison_plots.plot_rounds_to_target(curves, needed, 0.6, ""), y=y
    )
    target = figure.axes[0].lines[-1].get_ydata()[0]
    assert target == pytest.approx(60 if y == "accuracy" else 40)


def test_figures_have_the_size_the_font_and_the_style_that_are_asked_for(tmp_path):
    style = tmp_path / "own.mplstyle"
    style.write_text("axes.facecolor: red\n")
    run = configure(figure_size="3.3x2.2", figure_font=8, figure_style=str(style)).run
    form = figure_form.form_of(run)
    figure = drawn_with(lambda: plots.plot_convergence(RECORDS, NOTE), **form._asdict())
    assert tuple(figure.get_size_inches()) == (3.3, 2.2)
    assert figure.axes[0].get_facecolor() == (1, 0, 0, 1)
    figure_files.to_bytes(figure, form)
    sizes = {text.get_fontsize() for text in figure.findobj(matplotlib.text.Text)}
    assert sizes == {8}
    style.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"own.mplstyle' is not a matplotlib style file"):
        figure_form.form_of(run)
    for size in ("3", "0x3", "3.3x", "99x99", "3.3x2.2in"):
        with pytest.raises(UserError, match="give width and height from 1 to 40 inches"):
            configure(figure_size=size)


def test_a_legend_of_many_lines_is_beside_the_axes():
    """In them it would have the axis of the accuracies go on far below 0."""
    extra = {"attack_success": 0.5, "client_accuracy": 0.1, "client_worst10": 0.0}
    records = [dataclasses.replace(record, extra_accuracies=extra) for record in RECORDS]
    figure = plots.plot_convergence(records, NOTE)
    figure_files.to_bytes(figure)  # lays it out
    axes = figure.axes[1]
    assert axes.get_ylim()[0] > -10
    assert axes.get_window_extent().x1 <= figure.legends[0].get_window_extent().x0


def test_a_narrow_figures_legend_is_between_axes_and_caption():
    token = figure_form.FORM.set(figure_form.FigureForm(size=(3.4, 3.4), font=7.0))
    try:
        figure = plots.plot_convergence(RECORDS, "a part of a caption · " * 8, target=0.7)
        figure_files.to_bytes(figure)  # lays it out
    finally:
        figure_form.FORM.reset(token)
    legend = figure.legends[0].get_window_extent()
    axes_bottom = min(axes.get_tightbbox().y0 for axes in figure.axes)
    (caption,) = (text for text in figure.texts if "caption" in text.get_text())
    num_lines = len(caption.get_text().split("\n"))
    num_written = len(caption.get_text().strip().split("\n"))
    extent = caption.get_window_extent()
    caption_top = extent.y0 + extent.height * num_written / num_lines
    assert caption_top <= legend.y0 + 1 and legend.y1 <= axes_bottom + 1


def test_rows_without_errors_and_with_odd_names_are_drawn():
    """A log scale has no 0: half the least error, here of 1 %, stands for it."""
    curves = {"fedavg": [np.array([0.9, 0.99])], "_mine $5": [np.array([0.95, 1.0])]}
    figure = comparison_plots.plot_comparison(curves, "caption")
    lines = figure.axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [
        pytest.approx([10, 1]),
        pytest.approx([5, 0.5]),
    ]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["fedavg: 1.00 %", r" _mine \$5: 0.00 %"]


@pytest.mark.parametrize(
    ("form", "name", "num_rows"),
    [
        ("", "fedprox (client lr 0.05, prox mu {})", 30),
        ("--figure-size 3.3x2.2 --figure-font 8 --no-caption", "alpha {}", 6),
    ],
)
def test_a_legend_is_within_its_figure(form, name, num_rows):
    """In a column of a paper as many rows as fit in two columns."""
    curves = {name.format(k): [np.linspace(0.5, 0.9, 5)] for k in range(num_rows)}
    figure = drawn_with(
        lambda: comparison_plots.plot_comparison(curves, "caption"),
        **figure_form.form_of(fl.parse(form).run)._asdict(),
    )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == num_rows
    box = legend.get_window_extent()
    assert box.y0 >= 0 and box.y1 <= figure.bbox.height and box.x1 <= figure.bbox.width + 1
