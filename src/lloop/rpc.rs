//! The JSON-RPC methods.

use super::channel::ring_counts;
use super::options::{self, CreateParams, Options, OptionsChange};
use super::{attach, pool, stuck_threads};
use crate::error::Result;
use crate::os::root;
use crate::spdk::rpc::Method;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ffi::CStr;
use std::path::PathBuf;

/// No parameters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// `bdev_lloop_create`
pub struct Create;

#[async_trait(?Send)]
impl Method for Create {
    const NAME: &'static CStr = c"bdev_lloop_create";
    type Params = CreateParams;
    type Reply = String;

    async fn call(params: CreateParams) -> Result<String> {
        attach::attach(params).await
    }
}

/// Parameters of [`Delete`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteParams {
    name: String,
    #[serde(default)]
    force: bool,
}

/// `bdev_lloop_delete`
pub struct Delete;

#[async_trait(?Send)]
impl Method for Delete {
    const NAME: &'static CStr = c"bdev_lloop_delete";
    type Params = DeleteParams;
    type Reply = bool;

    async fn call(params: DeleteParams) -> Result<bool> {
        attach::detach(&params.name, params.force).await.map(|()| true)
    }
}

/// Parameters of [`Resize`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeParams {
    name: String,
    #[serde(default)]
    size: u64,
}

/// `bdev_lloop_resize`
pub struct Resize;

#[async_trait(?Send)]
impl Method for Resize {
    const NAME: &'static CStr = c"bdev_lloop_resize";
    type Params = ResizeParams;
    type Reply = u64;

    async fn call(params: ResizeParams) -> Result<u64> {
        attach::resize(&params.name, params.size).await
    }
}

/// A device's name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameParams {
    name: String,
}

/// `bdev_lloop_resume`
pub struct Resume;

#[async_trait(?Send)]
impl Method for Resume {
    const NAME: &'static CStr = c"bdev_lloop_resume";
    type Params = NameParams;
    type Reply = bool;

    async fn call(params: NameParams) -> Result<bool> {
        attach::resume(&params.name).await.map(|()| true)
    }
}

/// `bdev_lloop_set_options`
pub struct SetOptions;

#[async_trait(?Send)]
impl Method for SetOptions {
    const NAME: &'static CStr = c"bdev_lloop_set_options";
    const AT_STARTUP: bool = true;
    type Params = OptionsChange;
    type Reply = bool;

    async fn call(params: OptionsChange) -> Result<bool> {
        let new = params.apply()?;
        if let Some(pool) = pool() {
            pool.set_limits(&new.pool());
        }
        Ok(true)
    }
}

/// The options, and what is not one: no client can change it, and no saved configuration holds it.
#[derive(Serialize)]
pub struct OptionsReply {
    #[serde(flatten)]
    options: Options,
    /// The folders that files are attached from (`lloop_tgt --root`); none: all.
    roots: Vec<PathBuf>,
}

/// `bdev_lloop_get_options`
pub struct GetOptions;

#[async_trait(?Send)]
impl Method for GetOptions {
    const NAME: &'static CStr = c"bdev_lloop_get_options";
    const AT_STARTUP: bool = true;
    type Params = Nothing;
    type Reply = OptionsReply;

    async fn call(_: Nothing) -> Result<OptionsReply> {
        Ok(OptionsReply { options: options::current(), roots: root::folders() })
    }
}

/// Parameters of [`GetStats`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatsParams {
    name: Option<String>,
    #[serde(default)]
    histogram: bool,
}

/// `bdev_lloop_get_stats`
pub struct GetStats;

#[async_trait(?Send)]
impl Method for GetStats {
    const NAME: &'static CStr = c"bdev_lloop_get_stats";
    type Params = StatsParams;
    type Reply = Value;

    async fn call(params: StatsParams) -> Result<Value> {
        let devices = attach::devices(params.name.as_deref())?;
        let (live, active) = pool().map(|pool| pool.worker_counts()).unwrap_or_default();
        let (rings, sqpoll_ops) = ring_counts();
        Ok(json!({
            "workers": {"started": live, "active": active},
            "stuck_threads": stuck_threads(),
            "rings": {"open": rings, "sqpoll_ops": sqpoll_ops},
            "devices": devices.iter().map(|device| device.stats(params.histogram)).collect::<Vec<_>>(),
        }))
    }
}
