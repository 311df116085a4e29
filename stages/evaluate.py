"""Judge the trained network on the test images: data/predictions.csv and metrics/."""

from src import paths
from src.batches import choose_device, read_dataset
from src.environment import settle
from src.evaluation import fit_temperature, predict, probabilities, score, sure_from, tabulate
from src.intervals import report_few
from src.networks import load
from src.params import load_params
from src.runtime import PipelineError, counted, run, say, whole, write_json


def main() -> None:
    params = load_params().evaluate
    settle(load_params().train)
    network, card = load(paths.MODEL)
    data = read_dataset("path")
    if data.classes != card.classes:
        raise PipelineError(f"{paths.MODEL} was trained on other classes than {paths.SPLIT} has; run `dvc repro`")
    if (data.size, data.channels) != (card.size, card.channels):
        raise PipelineError(
            f"{paths.MODEL} was trained on images of another shape than {paths.IMAGES}; run `dvc repro`"
        )

    device = choose_device(params.device)
    found, codes = {}, {}
    for split in ("validation", "test"):
        table = data.table(split, device)
        codes[split] = table.labels.cpu().numpy()
        found[split] = predict(network, table, batch=params.batch, flip=params.flip)
    temperature = fit_temperature(found["validation"], codes["validation"])
    validation = probabilities(found["validation"], temperature)
    sure = sure_from(validation, codes["validation"], params.sure)
    places = data.places.iloc[data.rows("test")]
    predictions = tabulate(places, probabilities(found["test"], temperature), data.classes)
    overall, classes = score(predictions, data.classes, sure)
    overall |= {"temperature": temperature, "sure_from": sure}
    metrics = {name: overall[name] for name in ("accuracy", "macro_f1")}
    metrics["val_acc"] = float((validation.argmax(axis=1) == codes["validation"]).mean())

    with whole(paths.PREDICTIONS, paths.EVALUATION, paths.TEST_METRICS, paths.CLASS_METRICS) as outs:
        table_file, evaluation_file, metrics_file, class_file = outs
        predictions.to_csv(table_file, index=False, float_format="%.6g", lineterminator="\n")
        write_json(evaluation_file, overall)
        write_json(metrics_file, metrics)
        classes.to_csv(class_file, index=False, float_format="%.6g", lineterminator="\n")
    low, high = overall["accuracy_low"], overall["accuracy_high"]
    if sure is None:
        say(
            f"the {len(codes['validation']):,} validation images show no confidence from which {100 * params.sure:g} % "
            "of the answers are right, so no answer is called sure"
        )
    report_few("test", len(places), overall["accuracy"])
    tested = counted(len(places), "image")
    print(f"test accuracy {overall['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), {tested}")


if __name__ == "__main__":
    run(main)
