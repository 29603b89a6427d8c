// How C++ failures become values.
#pragma once
#include <c10/util/Exception.h>

#include <string>

/// The reason of this thread's last failure.
inline thread_local std::string last_error;

/// Runs `body`; on an exception records its message (without the C++ backtrace) and returns `fallback`.
template <class Result, class Body>
Result guarded(Result fallback, Body body) {
  last_error.clear();
  try {
    return body();
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown C++ exception";
  }
  if (last_error.empty()) last_error = "an exception without a message";
  return fallback;
}
