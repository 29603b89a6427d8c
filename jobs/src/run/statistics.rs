//! Token counts of a dataset under a tokenizer.

use lathe_model::protocol::{StatisticsTask, Task};

use super::{PrepareError, dataset_folder, tokenizer_folder};
use crate::{context::Context, lease::Claimed};

pub async fn task(context: &Context, claimed: &Claimed) -> Result<Task, PrepareError> {
    Ok(Task::Statistics(StatisticsTask {
        dataset: dataset_folder(context, claimed.dataset_id.as_deref()).await?.folder,
        tokenizer: tokenizer_folder(context, claimed.tokenizer_id.as_deref(), None).await?.folder,
    }))
}
