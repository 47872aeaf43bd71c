// torch ships the header of its Gloo process group without the headers of Gloo. This is as much of them as it needs to be
// read: names of types that are only ever handled through pointers here.
#pragma once
