"""Predicted against measured: what the devices at hand take, and how far off the simulator was.

cases        the small plans by which a device is measured, and those held out to judge the fit
samples      what executions tell of products, tasks and exchanges
fit          terms and tables, with their residuals
calibrate    all of it, into a cost model that extends the device's sheet
metrics      errors, noise, agreement of rankings, regret
validate     simulate, execute, join task by task
"""
