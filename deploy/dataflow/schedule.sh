#!/usr/bin/env bash
# Build the Flex Template and let Cloud Scheduler start it every night at 02:15 over the day's Parquet files.
# Usage: PROJECT=my-project BUCKET=my-bucket REGION=europe-west1 deploy/dataflow/schedule.sh
set -euo pipefail
: "${PROJECT:?the Google Cloud project}" "${BUCKET:?a bucket of it}" "${REGION:=europe-west1}"
REPOSITORY="${REGION}-docker.pkg.dev/${PROJECT}/distilbeam"
TEMPLATE="gs://${BUCKET}/templates/distilbeam.json"
ACCOUNT="distilbeam@${PROJECT}.iam.gserviceaccount.com"

gcloud dataflow flex-template build "${TEMPLATE}" \
  --project="${PROJECT}" \
  --image="${REPOSITORY}/launcher:0.1.0" \
  --sdk-language=PYTHON \
  --metadata-file=deploy/dataflow/metadata.json

BODY=$(cat <<JSON
{
  "launchParameter": {
    "jobName": "distilbeam-nightly",
    "containerSpecGcsPath": "${TEMPLATE}",
    "parameters": {
      "config": "/template/job.toml",
      "source": "parquet:gs://${BUCKET}/pool/*.parquet",
      "out": "gs://${BUCKET}/labels",
      "dead_letters": "gs://${BUCKET}/dead",
      "shards": "16",
      "sdk_container_image": "${REPOSITORY}/worker:0.1.0"
    },
    "environment": {"maxWorkers": 20, "tempLocation": "gs://${BUCKET}/temp", "serviceAccountEmail": "${ACCOUNT}"}
  }
}
JSON
)

gcloud scheduler jobs create http distilbeam-nightly \
  --project="${PROJECT}" --location="${REGION}" --schedule="15 2 * * *" --time-zone="Etc/UTC" \
  --uri="https://dataflow.googleapis.com/v1b3/projects/${PROJECT}/locations/${REGION}/flexTemplates:launch" \
  --http-method=POST --oauth-service-account-email="${ACCOUNT}" --message-body="${BODY}"
