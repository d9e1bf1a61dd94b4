"""What a round did, in a record."""

from harness.records import RoundRecord


def test_what_counts_as_trouble():
    def record(accuracy, loss=1.0, left_out=0):
        figures = {"dropped": 0, "bytes_down": 0, "bytes_up": 0, "epsilon": None, "seconds": 1.0}
        clients = [{"client": 0}, {"client": 1}]
        return RoundRecord(
            round=1,
            train_loss=1.0,
            train_accuracy=0.5,
            test_loss=loss,
            test_accuracy=accuracy,
            left_out=left_out,
            clients=clients,
            **figures,
        )

    good = record(0.9)
    assert good.trouble([], 10) == "" == record(0.1).trouble([], 10) == record(0.5).trouble([good], 10)
    assert "chance" in record(0.1).trouble([good], 10)
    assert "not finite" in record(0.1, loss=float("nan")).trouble([], 10)
    assert "no client" in record(0.9, left_out=2).trouble([], 10) and record(0.9, left_out=1).trouble([], 10) == ""
