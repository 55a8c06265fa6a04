"""What a run holds does not grow with its tokens."""

from tests.suite.small_runs import tables


def test_ten_times_the_tokens_peak_at_the_same_memory(worker, tmp_path, model_folder, text_file):
    peaks = []
    for number, superblocks in enumerate((3, 30)):
        made = tables(model_folder, text_file, tmp_path / f"run-{number}")
        made["activations"] |= {"ring_tokens": 8192, "forward_rows": 256}
        made["suite"] |= {"batch_size": 2000, "tokens": 2000 * 3 * superblocks}
        made["checkpoint"] |= {"steps": 10}
        assert worker(tables=made) == {"exit": 0}
        peaks.append(worker.peak)
    # The activations of the longer run are 40 MB, of a peak of some 400.
    assert peaks[1] < 1.03 * peaks[0], peaks
