"""Nightly labelling as Airflow DAGs (Airflow 2.7 or newer, also 3): ingest the day, say what it will cost, label, check; then train.

Put it into the folder of the DAGs and set the Airflow variable `distilbeam_home` to the directory that holds `nightly.toml`
and `.venv`. Each task is the same command as by hand. A task that is killed is simply started again: what is committed stays.
The night's run is of the day that ended before it, whatever version of Airflow decides: the timetable is named here, for
Airflow 3 takes a bare cron expression for the moment of the run, Airflow 2 for the interval before it.

The checked labels are an asset (in Airflow 2 a dataset): each night's check is an event of it, and the second DAG trains a student
whenever there is one. Whatever else is made of labels is scheduled by the same asset.
"""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from airflow.timetables.interval import CronDataIntervalTimetable

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG, Asset
except ImportError:  # Airflow 2
    from airflow.datasets import Dataset as Asset
    from airflow.models.dag import DAG
    from airflow.operators.bash import BashOperator

ZONE = "UTC"  # in which days begin, and in which it is 02:15

LABELS = Asset(
    "file:///srv/distilbeam/labelling/labels"
)  # a name that other DAGs know; nothing is read there by Airflow

COMMANDS = {
    "ingest": "distilbeam ingest incoming/{{ day(data_interval_start) }} --out pool/{{ day(data_interval_start) }} --format jsonl --id id",
    "plan": "distilbeam plan nightly.toml --json plan.json",
    "label": "distilbeam label nightly.toml --max-failures 1000 -- --direct_running_mode=multi_processing --direct_num_workers=4",
    "verify": "distilbeam verify labelling/labels --teacher nightly.toml --sample 100",
}
AGAIN = {
    "verify": 0
}  # what it finds wrong is wrong the next time too, and each time asks the teacher; 3 for the others
TRAIN = "distilbeam launch training.toml --set data.directory=students/$(date +%F)"  # [data] soft_labels = ["labelling/labels"]


def day(moment: datetime) -> str:
    """Name the day of a moment, as the folders of incoming examples are named."""
    return moment.astimezone(ZoneInfo(ZONE)).strftime("%Y-%m-%d")


with DAG(
    dag_id="distilbeam_nightly_labelling",
    description="Ingest the day's examples, label what is new, check a sample of the labels",
    schedule=CronDataIntervalTimetable("15 2 * * *", timezone=ZONE),
    start_date=datetime(2026, 1, 1, tzinfo=ZoneInfo(ZONE)),
    catchup=False,
    max_active_runs=1,  # one job at a time holds the directory
    user_defined_macros={"day": day},
    default_args={"retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=8)},
    tags=["distilbeam"],
) as dag:
    previous = None
    for name, command in COMMANDS.items():
        task = BashOperator(
            task_id=name,
            bash_command=f"cd {{{{ var.value.distilbeam_home }}}} && .venv/bin/{command}",
            retries=AGAIN.get(name, 3),
            outlets=[LABELS] if name == "verify" else [],
        )
        if previous is not None:
            previous >> task
        previous = task

with DAG(
    dag_id="distilbeam_student",
    description="Train a student on the labels, whenever they were checked",
    schedule=[LABELS],
    start_date=datetime(2026, 1, 1, tzinfo=ZoneInfo(ZONE)),
    catchup=False,
    max_active_runs=1,
    tags=["distilbeam"],
) as student_dag:
    BashOperator(task_id="train", bash_command=f"cd {{{{ var.value.distilbeam_home }}}} && .venv/bin/{TRAIN}")
