"""OpenVINO: conversion, compression, calibration and compilation of IRs."""
