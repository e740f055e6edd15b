"""SPICE by the Java program that pycocoevalcap carries, where the Stanford models it needs are there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from evlgen.common.registry import registry
from evlgen.tasks.metrics.base import CaptionMetric, MetricResult, MetricUnavailable, Tokenised
from evlgen.tasks.metrics.java import Java, JavaFailed, find_java, pycocoevalcap_file, run_java

# What SPICE takes out of Stanford CoreNLP; pycocoevalcap fetches them (400 MB) and does not carry them.
STANFORD_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE 1.0 serialises by reflection into packages that Java closed in version 16.
_OPENED = ("java.lang", "java.math", "java.net", "java.text", "java.util", "java.util.concurrent")


@registry.register_metric("spice")
class Spice(CaptionMetric):
    """SPICE 1.0, F-score over scene graphs, mean over images (Anderson et al., ECCV 2016).

    pycocoevalcap's own wrapper is not used: it downloads the models unasked, writes into the installed
    package, and keeps a cache whose native library is missing on some machines.
    """

    names = ("SPICE",)
    needs_java = True

    def unavailable(self) -> str | None:
        folder = pycocoevalcap_file("spice", "lib")
        missing = [name for name in STANFORD_JARS if not (folder / name).is_file()]
        if missing:
            return (
                f"{' and '.join(missing)} not in {folder}; "
                "`python -m pycocoevalcap.spice.get_stanford_models` downloads them (400 MB)"
            )
        return super().unavailable()

    def compute(self, references: Tokenised, candidates: Tokenised) -> MetricResult:
        java = find_java()
        if isinstance(java, str):
            raise MetricUnavailable(java)
        # Places in the list instead of image ids: those may be of several types.
        entries = [
            {"image_id": place, "test": line, "refs": list(references[image])}
            for place, (image, (line,)) in enumerate(candidates.items())
        ]
        try:
            answers = _run(java, entries)
            scores = {answer["image_id"]: float(answer["scores"]["All"]["f"]) for answer in answers}
            per_image = {image: scores[place] for place, image in enumerate(candidates)}
        except (JavaFailed, OSError, ValueError, KeyError, TypeError) as error:
            raise MetricUnavailable(
                f"SPICE's Java program failed ({error}); it needs up to 8 GB of memory"
            ) from error
        return MetricResult({"SPICE": sum(per_image.values()) / len(per_image)}, {"SPICE": per_image})


def _run(java: Java, entries: list[dict]) -> list[dict]:
    """What SPICE answers: for each entry its ``image_id`` and ``scores``."""
    opened = (
        [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED] if java.version > 8 else []
    )
    jar = pycocoevalcap_file("spice", "spice-1.0.jar")
    captions = sum(len(entry["refs"]) + 1 for entry in entries)
    with tempfile.TemporaryDirectory(prefix="evlgen_spice_") as folder:
        questions, answers = Path(folder, "questions.json"), Path(folder, "answers.json")
        questions.write_text(json.dumps(entries), encoding="utf-8")
        program = ("-Xmx8G", "-jar", str(jar), str(questions), "-out", str(answers), "-subset", "-silent")
        run_java(java, (*opened, *program), timeout=900 + 0.5 * captions, folder=Path(folder))
        return json.loads(answers.read_text(encoding="utf-8"))
