//! The contract of the data plane, over the devices of this host.

mod common;

use common::Devices;

migration::conformance_suite!(
    Devices::of_this_host();
    #[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
);
